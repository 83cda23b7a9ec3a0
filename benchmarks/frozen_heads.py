"""Poolings and projections on frozen towers: hidden states are computed once, so that a run takes seconds.

The papers put new heads on pretrained backbones. With the towers frozen, a comparison of losses, weightings or
poolings costs no pass through them, and enough seeds fit any machine; it says nothing about what towers would learn.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from vipolyqwen.data.sampler import MixtureSampler
from vipolyqwen.microbatches_vipolyqwen import length_buckets, take_rows
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.pooling_vipolyqwen import POOLING_CLASSES, PROJECTION_CLASSES, AttentionPooling
from vipolyqwen.training.microbatches import row_lengths
from vipolyqwen.training.mixed_loss import MixedLoss

FACTS = ("data_type", "similarity_scores", "a_keys", "b_keys", "groups", "modalities")
MONITORED = 20  # steps at the beginning and at the end whose losses and gradients are reported
ROUTES = ("pooling", "audio_pooling")


@dataclass(frozen=True)
class States:
    """The sides of P pairs behind the towers.

    Attributes:
        hidden: 2P of (positions, D) float16, sides a and then sides b.
        is_audio: (2P,) bool, sides of the speech encoder.
        facts: what the loss needs to know of the pairs, (P,) each.
    """

    hidden: list[Tensor]
    is_audio: Tensor
    facts: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.hidden) // 2


@torch.inference_mode()
def tower_states(model: ViPolyQwenModel, batches: Iterable[Mapping[str, Any]]) -> States:
    """Runs collated batches through the towers of a model.

    Raises:
        ValueError: a side has both audio and text or images, whose fusion is not a head.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = {name: getattr(model, name) for name in ROUTES if name in dict(model.named_children())}
    hooks = [module.register_forward_pre_hook(_remember(seen, name)) for name, module in modules.items()]
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    audio: tuple[list[bool], list[bool]] = ([], [])
    facts: dict[str, list[Tensor]] = {name: [] for name in FACTS}
    for batch in batches:
        count = len(batch["data_type"])
        found = _states_of(model, batch, seen)
        for side in (0, 1):
            rows = range(side * count, (side + 1) * count)
            sides[side].extend(found[row][0] for row in rows)
            audio[side].extend(found[row][1] for row in rows)
        for name, values in facts.items():
            values.append(batch[name])
    for hook in hooks:
        hook.remove()
    joined = {name: torch.cat(values) for name, values in facts.items()}
    return States([*sides[0], *sides[1]], torch.tensor([*audio[0], *audio[1]]), joined)


def _remember(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        seen[name] = inputs

    return hook


def _states_of(
    model: ViPolyQwenModel, batch: Mapping[str, Any], seen: dict[str, tuple[Tensor, Tensor]]
) -> dict[int, tuple[Tensor, bool]]:
    """Hidden states of each side of a batch, and whether they are those of audio."""
    found: dict[int, tuple[Tensor, bool]] = {}
    has_audio = batch.get("has_audio", torch.zeros(len(batch["attention_mask"]), dtype=torch.bool))
    for rows in map(torch.tensor, length_buckets(row_lengths(batch).tolist())):
        seen.clear()
        inputs = {name: value.to(model.device) for name, value in take_rows(batch, rows).items()}
        model._embed_batch(**inputs)  # `forward` would divide and reorder the rows again
        routes = {"pooling": rows[batch["attention_mask"][rows].any(dim=1)], "audio_pooling": rows[has_audio[rows]]}
        for name, (hidden, mask) in seen.items():
            for row, states, real in zip(routes[name].tolist(), hidden, mask, strict=True):
                if row in found:
                    raise ValueError(f"Row {row} has audio beside text or images; frozen heads take one route a side.")
                found[row] = states[real].half().cpu(), name == "audio_pooling"
    return found


class Heads(nn.Module):
    """Pooling and projection of each route, new or those of a trained model."""

    def __init__(self, model: ViPolyQwenModel, settings: Mapping[str, Any], fresh: bool) -> None:
        super().__init__()
        config = model.config
        widths = {"": config.text_config.hidden_size}
        if config.audio_config is not None:
            widths["audio_"] = config.audio_config.hidden_size
        for route, width in widths.items():
            pooling = settings.get(f"{route}pooling") or settings.get("pooling") or config.pooling
            projection = settings.get(f"{route}projection") or settings.get("projection") or config.projection
            parts = {
                "pooling": POOLING_CLASSES[pooling](width),
                "projection": PROJECTION_CLASSES[projection](width, config.projection_dim),
            }
            for name, part in parts.items():
                old = getattr(model, route + name)
                if not fresh and type(old).__name__ == type(part).__name__:
                    part = copy.deepcopy(old).float()
                elif isinstance(part, AttentionPooling):
                    nn.init.normal_(part.query, std=config.initializer_range)
                setattr(self, route + name, part)

    def forward(self, hidden: Sequence[Tensor], is_audio: Tensor) -> Tensor:
        """Embeds sides of (positions, D) as unit vectors, (sides, projection_dim) float32."""
        vectors, places = [], []
        for route, rows in (("", (~is_audio).nonzero().flatten()), ("audio_", is_audio.nonzero().flatten())):
            if len(rows):
                chosen = [hidden[row] for row in rows.tolist()]
                lengths = torch.tensor([len(states) for states in chosen])
                padded = pad_sequence(chosen, batch_first=True).float()  # (rows, N, D)
                mask = torch.arange(padded.shape[1]) < lengths[:, None]
                pooled, _ = getattr(self, f"{route}pooling")(padded, mask)
                vectors.append(normalize(getattr(self, f"{route}projection")(pooled), dim=-1))
                places.append(rows)
        joined = torch.cat(vectors)
        return torch.empty_like(joined).index_copy(0, torch.cat(places), joined)


@torch.inference_mode()
def head_vectors(heads: Heads, states: States, batch: int = 256) -> dict[str, Tensor]:
    """Vectors `a` and `b` of all pairs, as `pair_vectors.embed` returns them."""
    parts = [
        heads(states.hidden[first : first + batch], states.is_audio[first : first + batch])
        for first in range(0, len(states.hidden), batch)
    ]
    a, b = torch.cat(parts).split(len(states))
    return {"a": a, "b": b, **{name: states.facts[name] for name in ("a_keys", "b_keys", "similarity_scores")}}


@dataclass(frozen=True)
class Rows:
    """Rows to train on: the pairs of each source, as positions in `States`, and how often an epoch visits them."""

    sources: Sequence[Sequence[int]]
    weights: Sequence[float]


def train_heads(
    heads: Heads, views: tuple[States, States], rows: Rows, loss: MixedLoss, settings: Mapping[str, Any], seed: int
) -> dict[str, dict[str, float]]:
    """Trains heads on states with prefixes, of which `prefix_dropout` are replaced by those without.

    Args:
        heads: trained in place.
        views: the pairs with prefixes and without.
        rows: the mixture.
        loss: of the batch; its parameters are trained too.
        settings: of a recipe: max_steps, per_device_train_batch_size, learning_rate, warmup_steps, prefix_dropout.
        seed: of order and dropout.

    Returns:
        figures of the loss at the beginning and at the end, as the trainer logs them.
    """
    steps, size = settings["max_steps"], settings["per_device_train_batch_size"]
    rate = settings["learning_rate"]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(heads.parameters()), "weight_decay": settings.get("weight_decay", 0.0)},
            {"params": list(loss.parameters()), "lr": settings.get("loss_learning_rate") or rate, "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, settings.get("adam_beta2", 0.999)),
    )
    warm = settings.get("warmup_steps", 0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, warm, steps))
    order, dropped = _order(rows, steps * size, seed), torch.Generator().manual_seed(seed)
    epoch_length = max(1, sum(round(w * len(s)) for w, s in zip(rows.weights, rows.sources, strict=True)))
    heads.train(), loss.train()
    seen: dict[str, list[Tensor]] = {"first": [], "last": []}
    for step in range(steps):
        chosen = order[step * size : (step + 1) * size]
        bare = (torch.rand(size, generator=dropped) < settings.get("prefix_dropout", 0.1)).tolist()
        vectors = _embed(heads, views, chosen, bare)
        when = "first" if step < MONITORED else "last" if step >= steps - MONITORED else None
        index = torch.tensor(chosen)
        facts = {name: views[0].facts[name][index] for name in FACTS}
        output = loss(
            *vectors.split(size),
            facts["data_type"],
            facts["similarity_scores"],
            facts["a_keys"],
            facts["b_keys"],
            epoch=step * size / epoch_length,
            groups=facts["groups"],
            modalities=facts["modalities"],
            with_gradients=when is not None,
        )
        if when is not None:
            seen[when].append(loss.measure(output)[1])
        if not torch.isfinite(output.loss):
            raise FloatingPointError(f"Step {step}: the loss is {output.loss.item()}; lower the learning rate {rate}.")
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(heads.parameters(), settings.get("max_grad_norm", 1.0))
        optimizer.step()
        schedule.step()
    heads.eval()
    return {when: loss.figures.average(figures) for when, figures in seen.items() if figures}


def _embed(heads: Heads, views: tuple[States, States], chosen: list[int], bare: list[bool]) -> Tensor:
    """Vectors of sides a and then b of some pairs, (2 · pairs, projection_dim)."""
    count = len(views[0])
    places = [*chosen, *(row + count for row in chosen)]
    hidden = [views[without].hidden[place] for place, without in zip(places, [*bare, *bare], strict=True)]
    return heads(hidden, views[0].is_audio[torch.tensor(places)])


def _order(rows: Rows, wanted: int, seed: int) -> list[int]:
    """So many pairs, epoch after epoch."""
    flat = [row for source in rows.sources for row in source]
    sampler = MixtureSampler([len(source) for source in rows.sources], rows.weights, seed)
    order: list[int] = []
    while len(order) < wanted:
        order.extend(flat[row] for row in sampler)
        sampler.set_epoch(sampler.epoch + 1)
    return order[:wanted]


def _cosine(step: int, warm: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0: the factor of the learning rate."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
