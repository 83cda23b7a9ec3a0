"""Micro-batches: limits of rows and tokens, images that rows share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients, build_trainer, gradients_of, training_step
from torch import Tensor

from vipolyqwen.microbatches_vipolyqwen import length_buckets, members, take_rows
from vipolyqwen.training.arguments import read_arguments
from vipolyqwen.training.microbatches import (
    MicrobatchLimit,
    RowSize,
    first_images,
    plan_microbatches,
)
from vipolyqwen.training.trainer import ViPolyQwenTrainer


@pytest.fixture(scope="module")
def corpus(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of `world` and its pairs, of which three rows show each of the four images; some have negatives."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"negatives": [f"no {n} {k}" for k in range(n % 3)]} for n, row in enumerate(rows)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "base").symlink_to(world / "base")
    (folder / "media").symlink_to(world)
    return folder


@pytest.fixture(scope="module")
def full_batch(corpus: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gradients and log of a step of all rows, without limits."""
    trainer, pairs = build_trainer(corpus)
    log = training_step(trainer, list(pairs))
    return gradients_of(trainer), log


def watch(trainer: ViPolyQwenTrainer) -> tuple[list[tuple[bool, int, int]], list[tuple[bool, int]]]:
    """Fills two lists while the trainer works.

    They hold (with gradient, rows, positions) of each micro-batch and (with gradient, images) of each vision pass.
    """
    microbatches, passes = [], []

    def see_microbatch(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        positions = clips = texts = 0
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"]
            texts, positions = len(mask), int(mask.any(1).sum()) * mask.shape[1]
        if "audio_features" in inputs:
            lengths = inputs["audio_attention_mask"].sum(1)
            clips = len(lengths)
            frames = trainer.model.audio_tower._get_feat_extract_output_lengths(lengths)
            positions += clips * int(frames.max())
        microbatches.append((torch.is_grad_enabled(), max(texts, clips), positions))

    def see_images(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        passes.append((torch.is_grad_enabled(), len(inputs["grid_thw"])))

    trainer.model.register_forward_pre_hook(see_microbatch, with_kwargs=True)
    trainer.model.vlm.visual.register_forward_pre_hook(see_images, with_kwargs=True)
    return microbatches, passes


# --- the plan


def sizes(*tokens: int) -> list[RowSize]:
    return [RowSize(count) for count in tokens]


def test_without_a_limit_rows_of_similar_length_go_together() -> None:
    assert plan_microbatches(sizes(3, 40, 0, 41, 4), MicrobatchLimit(), cost=64) == [[3, 1], [4, 0, 2]]
    assert plan_microbatches([], MicrobatchLimit()) == []


@pytest.mark.parametrize(
    ("limit", "microbatches"),
    [
        (MicrobatchLimit(rows=2), [[0, 1], [2, 3]]),  # one micro-batch less saves more than the padding costs
        (MicrobatchLimit(tokens=12), [[0], [1, 2, 3]]),  # 3 rows × 4 tokens
        (MicrobatchLimit(tokens=11), [[0], [1, 2], [3]]),
        (MicrobatchLimit(tokens=1), [[0], [1], [2], [3]]),  # a row is never cut
        (MicrobatchLimit(rows=2, tokens=12), [[0], [1, 2], [3]]),
        (MicrobatchLimit(packed=True), [[0, 1, 2, 3]]),
        (MicrobatchLimit(tokens=14, packed=True), [[0, 1], [2, 3]]),  # 10 + 4 tokens, without padding
    ],
)
def test_no_microbatch_exceeds_the_limit(limit: MicrobatchLimit, microbatches: list[list[int]]) -> None:
    assert plan_microbatches(sizes(10, 4, 4, 3), limit) == microbatches


def test_audio_frames_count_as_tokens_and_audio_of_similar_length_goes_together() -> None:
    rows = [RowSize(0, 5), RowSize(0, 50), RowSize(3), RowSize(0, 6), RowSize(4)]
    assert plan_microbatches(rows, MicrobatchLimit(tokens=50)) == [
        [1],
        [3, 0, 4, 2],
    ]  # 2 clips × 6 frames + 2 texts × 4
    assert plan_microbatches(rows, MicrobatchLimit(tokens=19)) == [[1], [3, 0, 4], [2]]


def test_rows_of_one_image_stay_together_within_the_limit() -> None:
    rows = [RowSize(9, image=1), RowSize(50, image=0), RowSize(8), RowSize(10, image=0), RowSize(9, image=1)]
    assert plan_microbatches(rows, MicrobatchLimit(), cost=64) == [[1, 3], [0, 4, 2]]
    assert plan_microbatches(rows, MicrobatchLimit(rows=2)) == [[1, 3], [0, 4], [2]]
    assert plan_microbatches(rows, MicrobatchLimit(rows=1)) == [[1], [3], [0], [4], [2]]


def test_length_buckets_have_the_lowest_cost() -> None:
    lengths = [80, 3, 40, 0, 79, 2, 41, 5, 0]
    assert length_buckets(lengths, microbatch_cost=0) == [[0], [4], [6], [2], [7], [1], [5, 3, 8]]  # no padding at all
    assert length_buckets(lengths, microbatch_cost=10) == [
        [0, 4],
        [6, 2],
        [7, 1, 5, 3, 8],
    ]  # 160 + 82 + 15 + 3 · 10
    assert length_buckets(lengths, microbatch_cost=1000) == [[0, 4, 6, 2, 7, 1, 5, 3, 8]]
    assert length_buckets([0, 0]) == [[0, 1]]
    assert length_buckets([]) == []


def test_length_buckets_fill_the_microbatches_that_a_limit_allows() -> None:
    lengths = [10, 10, 9, 5, 5]
    assert length_buckets(lengths, microbatch_cost=8) == [[0, 1, 2], [3, 4]]  # 30 + 10 + 2 · 8; together 50 + 8
    assert length_buckets(
        lengths, microbatch_cost=8, least_microbatches=MicrobatchLimit(rows=2).least_microbatches
    ) == [
        [0, 1],
        [2],
        [3, 4],
    ]  # 39 + 3 · 8
    assert length_buckets(lengths, microbatch_cost=8, counts=[1, 1, 4, 1, 1])[0] == [0, 1, 2]


def test_many_lengths_are_grouped_in_classes() -> None:
    buckets = length_buckets(list(range(1, 4001)))
    assert sorted(row for bucket in buckets for row in bucket) == list(range(4000))
    assert 4000 * 4001 / 2 < sum(len(bucket) * (bucket[0] + 1) for bucket in buckets) < 1.05 * 4000 * 4001 / 2


# --- at most so many tokens a forward


@pytest.mark.parametrize("budget", [1, 60, 10**6])
@pytest.mark.parametrize("rows", [None, 3])
def test_a_token_budget_bounds_each_microbatch_and_keeps_the_gradients(
    corpus: Path, full_batch: tuple[dict, dict], budget: int, rows: int | None
) -> None:
    flags = [] if rows is None else ["--embed_chunk", str(rows)]
    trainer, pairs = build_trainer(corpus, "--embed_chunk_tokens", str(budget), *flags)
    microbatches, _ = watch(trainer)
    log = training_step(trainer, list(pairs))
    assert_same_gradients(gradients_of(trainer), full_batch[0])
    assert log == pytest.approx(full_batch[1], rel=1e-4, abs=1e-6)
    assert [with_gradient for with_gradient, *_ in microbatches] == [False] * (len(microbatches) // 2) + [True] * (
        len(microbatches) // 2
    )
    for _, size, positions in microbatches:
        assert size == 1 or (positions <= budget and size <= (rows or size))
    assert (max(size for _, size, _ in microbatches) > 1) == (budget > 1)


def test_a_budget_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="`embed_chunk_tokens` is 0; give a number of tokens >= 1"):
        read_arguments(["--model", "x", "--output_dir", "x", "--use_cpu", "true", "--embed_chunk_tokens", "0"])


# --- images that rows share


def unshared(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with every image as often as it is shown."""
    patches = members(batch["image_grid_thw"].prod(dim=-1), batch["image_indices"])
    return batch | {
        "pixel_values": batch["pixel_values"][patches],
        "image_grid_thw": batch["image_grid_thw"][batch["image_indices"]],
        "image_indices": torch.arange(len(batch["image_indices"])),
    }


def test_a_batch_holds_each_different_image_once(corpus: Path) -> None:
    trainer, pairs = build_trainer(corpus)
    batch = trainer.data_collator(list(pairs))
    assert len(batch["image_grid_thw"]) == 4
    assert batch["image_indices"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert first_images(batch).tolist()[:10] == [-1, -1, 0, 0, 0, -1, -1, -1, 1, 1]
    shown = trainer.processing_class(images=[pairs[number]["images_a"] for number in (2, 8)], return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"][: len(shown["pixel_values"])], shown["pixel_values"])


@pytest.mark.parametrize(
    ("flags", "passes"),
    [([], [(True, 4)]), (["--embed_chunk", "3"], [(False, 1)] * 4 + [(True, 1)] * 4), (["--packing", "true"], None)],
)
def test_a_shared_image_is_encoded_once_a_step(corpus: Path, flags: list[str], passes: list | None) -> None:
    trainer, pairs = build_trainer(corpus, *flags)
    _, seen = watch(trainer)
    trainer.training_step(trainer.model, trainer.data_collator(list(pairs)))
    assert seen == (passes or [(True, 4)])


@pytest.mark.parametrize("flags", [[], ["--embed_chunk", "2"], ["--packing", "true"]])
def test_sharing_changes_neither_vectors_nor_gradients(corpus: Path, flags: list[str]) -> None:
    trainer, pairs = build_trainer(corpus, *flags)
    batch = trainer.data_collator(list(pairs))
    vectors = {}
    gradients = {}
    for name, inputs in {"shared": batch, "unshared": unshared(batch)}.items():
        _, passes = watch(trainer)
        trainer.model.zero_grad()
        vectors[name] = trainer.embed(trainer.model, inputs).detach()
        trainer.compute_loss(trainer.model, inputs).backward()
        gradients[name] = {key: value.clone() for key, value in gradients_of(trainer).items()}
        assert sum(images for _, images in passes) >= (24 if name == "unshared" else 8)
    assert (vectors["shared"] - vectors["unshared"]).abs().max() <= 1e-5
    assert_same_gradients(gradients["shared"], gradients["unshared"])


@torch.no_grad()
def test_a_shared_image_gives_each_row_the_vector_it_has_alone(corpus: Path) -> None:
    trainer, pairs = build_trainer(corpus)
    model = trainer.model.eval()
    batch = trainer.data_collator(list(pairs))
    together = trainer.embed(model, batch)
    rows = (first_images(batch) >= 0).nonzero().flatten().tolist()
    assert len(rows) == 12
    for row in rows:
        inputs = take_rows(unshared(batch), torch.tensor([row]))
        del inputs["image_indices"]  # the model's own interface
        torch.testing.assert_close(model(**inputs).embeddings[0], together[row], atol=1e-5, rtol=0)
