"""Fusion of text and audio by attention: the formula by hand, rows of one route, and agreement of every batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_tiny_model, random_audio, random_image, shake, speech_config
from torch import Tensor
from torch.nn.functional import normalize

from vipolyqwen.demo.tiny_base import tiny_vlm_config
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.pooling_vipolyqwen import AttentionFusion, PackedStates
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.training.build import build_model

TOLERANCE = 1e-5  # largest absolute difference in float32


@pytest.fixture(scope="module")
def fused(processor: ViPolyQwenProcessor) -> ViPolyQwenModel:
    """A model with trained-like weights that fuses by attention."""
    return build_tiny_model(processor, speech_config(), audio_fusion="attention")


def rows_of(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Inputs of one route, then inputs of both."""
    return [
        {"text": "Huế"},
        {"audio": random_audio(rng, 0.31)},
        {"text": "tiếng sóng biển", "audio": random_audio(rng, 0.12)},
        {"images": [random_image(rng, 90, 40)], "audio": random_audio(rng, 0.5)},
        {"text": "cả ba, dài hơn nhiều", "images": [random_image(rng)], "audio": random_audio(rng, 0.08)},
    ]


def collate(processor: ViPolyQwenProcessor, rows: list[dict[str, Any]], side: str = "right") -> dict[str, Tensor]:
    return processor(
        text=[row.get("text", "") for row in rows],
        images=[row.get("images") for row in rows],
        audio=[row.get("audio") for row in rows],
        padding_side=side,
        return_tensors="pt",
    )


def by_hand(module: AttentionFusion, vector: Tensor, text: Tensor, audio: Tensor) -> np.ndarray:
    """The formula of `AttentionFusion` for one row in float64: states (N, D) and (K, D_audio)."""
    w = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
    x, h, s = (value.detach().double().numpy() for value in (vector, text, audio))
    keys = np.concatenate([h @ w["text_key.weight"].T, s @ w["audio_key.weight"].T])
    values = np.concatenate([h @ w["text_value.weight"].T, s @ w["audio_value.weight"].T])
    query, context = w["query.weight"] @ x, []
    for q, k, v in zip(*(np.split(m, module.heads, axis=-1) for m in (query, keys, values)), strict=True):
        scores = np.exp(k @ q / np.sqrt(len(q)))
        context.append(scores / scores.sum() @ v)
    return x + w["out.weight"] @ np.concatenate(context)


@pytest.mark.parametrize(("width", "heads"), [(5, 1), (128, 2)])
def test_the_fusion_is_one_attention_over_the_states_of_both_routes(width: int, heads: int) -> None:
    torch.manual_seed(0)
    module = shake(AttentionFusion(6, 4, width))
    assert module.heads == heads
    masks = [torch.tensor(mask).bool() for mask in ([[1, 1, 1, 0], [0, 0, 1, 1]], [[1, 0], [1, 1]])]
    states = [10 * torch.randn(int(masks[0].sum()), 6), 10 * torch.randn(int(masks[1].sum()), 4)]
    vectors = torch.randn(2, width)
    found = module(vectors, *(PackedStates(*given) for given in zip(states, masks, strict=True)))
    texts, clips = states[0].split([3, 2]), states[1].split([1, 2])
    for row in range(2):
        expected = by_hand(module, vectors[row], texts[row], clips[row])
        np.testing.assert_allclose(found[row].detach().numpy(), expected, atol=1e-5)


def test_the_softmax_is_in_float32_also_in_bfloat16() -> None:
    torch.manual_seed(0)
    module = shake(AttentionFusion(6, 4, 128))
    states = [torch.randn(300, 6).bfloat16(), torch.randn(300, 4).bfloat16()]
    masks = [torch.ones(1, 300, dtype=torch.bool)] * 2
    vectors = torch.randn(1, 128)
    routes = [PackedStates(*given) for given in zip(states, masks, strict=True)]
    found = module.bfloat16()(vectors, *routes)
    assert found.dtype == torch.float32
    # were the 600 weights bfloat16, they would sum to 1 ± 0.004 and the mean below would lose its digits
    expected = by_hand(module.float(), vectors[0], states[0].float(), states[1].float())
    np.testing.assert_allclose(found[0].detach().numpy(), expected, atol=0.02)


@torch.no_grad()
def test_it_starts_as_the_mean_and_leaves_rows_of_one_route_alone(processor: Any, rng: np.random.Generator) -> None:
    backbones = tiny_vlm_config(processor.tokenizer, 64, 2, 32), speech_config()
    torch.manual_seed(0)
    start = build_model(*backbones, audio_fusion="attention").eval()
    mean = build_model(*backbones, audio_fusion="mean").eval()
    missing, unexpected = mean.load_state_dict(start.state_dict(), strict=False)
    assert not missing and {name.split(".")[0] for name in unexpected} == {"audio_fusion"}
    batch = collate(processor, rows_of(rng))
    wanted = mean(**batch).embeddings
    assert torch.equal(start(**batch).embeddings, wanted)
    shake(start.audio_fusion)
    moved = (start(**batch).embeddings - wanted).abs().amax(dim=1)
    assert (moved[:2] == 0).all() and (moved[2:] > 0.01).all()


@torch.no_grad()
def test_a_fused_vector_is_that_of_its_states(fused: Any, processor: Any, rng: np.random.Generator) -> None:
    row = {"text": "biển", "audio": random_audio(rng, 0.3)}
    seen = []
    hook = fused.audio_fusion.register_forward_pre_hook(lambda _, given: seen.append(given))
    vector = fused(**collate(processor, [row])).embeddings[0]
    hook.remove()
    (total, text, audio), batch = seen[0], collate(processor, [row])
    halves = [fused(**collate(processor, [{name: row[name]}])).embeddings[0] for name in ("text", "audio")]
    torch.testing.assert_close(total[0], sum(halves), atol=TOLERANCE, rtol=0)
    hidden = fused(**collate(processor, [{"text": "biển"}]), output_hidden_states=True).hidden_states[-1]
    assert len(text.states) == int(batch["attention_mask"].sum()) == hidden.shape[1]
    expected = normalize(torch.from_numpy(by_hand(fused.audio_fusion, total[0], text.states, audio.states)), dim=0)
    torch.testing.assert_close(vector.double(), expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("packing", [False, True])
def test_a_fused_row_gets_the_same_vector_in_every_batch(
    packing: bool, fused: Any, processor: Any, rng: np.random.Generator
) -> None:
    rows = rows_of(rng)
    alone = torch.cat([fused(**collate(processor, [row])).embeddings for row in rows])
    for side in ("right", "left"):
        for _ in range(2):
            order = rng.permutation(len(rows))[: rng.integers(2, len(rows) + 1)]
            batch = collate(processor, [rows[i] for i in order], side)
            together = fused(**batch, packing=packing).embeddings
            assert (together - alone[torch.from_numpy(order)]).abs().max() <= TOLERANCE, (side, order)


def test_a_batch_without_a_row_of_both_routes_gives_the_fusion_no_gradient_and_one_with_all(
    processor: Any, rng: np.random.Generator
) -> None:
    model = build_tiny_model(processor, speech_config(), audio_fusion="attention").train()
    rows = rows_of(rng)
    for chosen, reached in ((rows[:2], False), (rows, True)):
        model.zero_grad()
        vectors = model(**collate(processor, chosen)).embeddings
        (vectors * torch.randn(vectors.shape)).sum().backward()
        for name, parameter in model.audio_fusion.named_parameters():
            assert (parameter.grad is not None and bool(parameter.grad.abs().max() > 0)) == reached, name


@torch.no_grad()
def test_a_saved_model_with_fusion_loads_bit_for_bit(
    fused: Any, processor: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    fused.save_pretrained(tmp_path)
    loaded, report = ViPolyQwenModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = collate(processor, rows_of(rng))
    assert torch.equal(loaded(**batch).embeddings, fused(**batch).embeddings)


@torch.no_grad()
def test_a_checkpoint_trained_with_the_mean_continues_with_attention_where_it_was(
    processor: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = build_tiny_model(processor, speech_config())
    model.save_pretrained(tmp_path)
    loaded = ViPolyQwenModel.from_pretrained(tmp_path, audio_fusion="attention")
    assert loaded.audio_fusion.query.weight.std().item() == pytest.approx(0.02, rel=0.1)
    batch = collate(processor, rows_of(rng))
    torch.testing.assert_close(loaded(**batch).embeddings, model(**batch).embeddings, atol=1e-6, rtol=0)


@torch.no_grad()
def test_bfloat16_fuses_close_to_the_exact_vectors(processor: Any, rng: np.random.Generator) -> None:
    model = build_tiny_model(processor, speech_config(), audio_fusion="attention")
    batch = collate(processor, rows_of(rng))
    exact = model(**batch).embeddings
    vectors = model.bfloat16()(**batch).embeddings
    assert vectors.dtype == torch.float32
    assert (vectors * exact).sum(dim=-1).min() > 0.98
