"""Packed rows: one sequence without padding gives what padded rows give, whichever attention keeps them apart."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from helpers import assert_same_gradients, build_trainer, gradients_of, random_audio, random_image, training_step
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vipolyqwen import packing_vipolyqwen as packing
from vipolyqwen.configuration_vipolyqwen import POOLINGS
from vipolyqwen.demo.tiny_base import tiny_audio_config, tiny_vlm_config
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.packing_vipolyqwen import TORCH_VARLEN, choose_attn_implementation, takes_lengths
from vipolyqwen.training.arguments import read_arguments
from vipolyqwen.training.build import build_model

TOLERANCE = 1e-5  # largest absolute difference in float32


@pytest.fixture(scope="module")
def batches(tiny: tuple) -> dict[str, dict[str, Tensor]]:
    """Inputs of rows of very different lengths, by what they are of."""
    rng = np.random.default_rng(0)
    images = [random_image(rng), random_image(rng, 90, 30), random_image(rng, 30, 90)]
    texts = ["Biển ghi gì?", "a", "Hai ngôi sao đỏ lớn trên bãi cỏ. " * 5, "有四个"]
    clips = [None, random_audio(rng, 0.3), random_audio(rng, 0.5), None]

    def batch(**inputs: Any) -> dict[str, Tensor]:
        return dict(tiny[1](**inputs, return_tensors="pt"))

    shown = [images[:1], [], images[1:], [images[0]]]
    return {
        "text": batch(text=texts),
        "one row": batch(text=texts[:1]),
        "images": batch(text=texts, images=shown),
        "audio": batch(text=["", "", *texts[2:]], audio=clips[1:3] + clips[:2]),
        "everything": batch(text=texts, images=shown, audio=clips),
    }


def built(tiny: tuple, **fields: Any) -> ViPolyQwenModel:
    """A tiny model whose weights are far from their initial values, so that nothing is nearly uniform."""
    torch.manual_seed(0)
    model = build_model(tiny_vlm_config(tiny[1].tokenizer, 64, 2, 32), tiny_audio_config(32, 2), **fields)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with their padding on the other side."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)  # zeros first
    return batch | {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}


def assert_packed_is_padded(model: ViPolyQwenModel, batch: dict[str, Tensor]) -> None:
    """Vectors and pooling weights."""
    seen = []
    hook = model.vlm.language_model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    padded = model(**batch, output_pooling_weights=True)
    packed = model(**batch, output_pooling_weights=True, packing=True)
    hook.remove()
    mask = batch["attention_mask"]
    assert seen == [mask[mask.any(1)].shape, (1, int(mask.sum()))]
    assert (packed.embeddings - padded.embeddings).abs().max() <= TOLERANCE
    assert packed.pooling_weights.shape == padded.pooling_weights.shape
    assert (packed.pooling_weights - padded.pooling_weights).abs().max() <= TOLERANCE


# --- the model


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_rows_have_the_vectors_of_padded_rows(tiny: tuple, batches: dict, pooling: str, attention: str) -> None:
    model = built(tiny, pooling=pooling, attn_implementation=attention)
    for batch in batches.values():
        assert_packed_is_padded(model, batch)
        assert_packed_is_padded(model, left_padded(batch))


@torch.no_grad()
def test_packed_rows_do_not_see_each_other(tiny: tuple, batches: dict) -> None:
    model, batch = built(tiny), dict(batches["text"])
    before = model(**batch, packing=True).embeddings
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][1, 0] = batch["input_ids"][0, 0]
    after = model(**batch, packing=True).embeddings
    assert ((after - before).abs().amax(dim=1) > 1e-3).tolist() == [False, True, False, False]
    assert torch.equal(after[0], before[0])


@torch.no_grad()
def test_packed_embeddings_in_place_of_tokens_have_the_same_vectors(tiny: tuple, batches: dict) -> None:
    model, batch = built(tiny), dict(batches["text"])
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    padded, packed = (model(**batch, packing=packed).embeddings for packed in (False, True))
    assert (packed - padded).abs().max() <= TOLERANCE


def test_hidden_states_of_packed_rows_are_refused(tiny: tuple, batches: dict) -> None:
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match="`packing` joins the rows"):
            tiny[0](**batches["text"], packing=True, **{name: True})


# --- attention that takes lengths: the calls that FlashAttention and torch get, answered on the CPU


def by_lengths(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, **options: Any) -> Tensor:
    """Attention within each row of (T, heads, size) sequences: what such kernels compute."""
    assert boundaries.dtype == torch.int32 and boundaries[0] == 0 and boundaries[-1] == len(query) == len(key)
    assert longest == boundaries.diff().max()
    pieces = [states.split(boundaries.diff().tolist()) for states in (query, key, value)]
    attended = [
        scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in piece), enable_gqa=True, **options)
        for piece in zip(*pieces, strict=True)
    ]
    return torch.cat([of_row[0].transpose(0, 1) for of_row in attended])


def flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Stands in for `flash_attn_varlen_func`."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k and dropout_p == 0
    return by_lengths(q, k, v, cu_seqlens_q, max_seqlen_q, scale=softmax_scale, is_causal=causal)


def torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Stands in for `torch.nn.attention.varlen.varlen_attn`."""
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size == (-1, 0)
    return by_lengths(query, key, value, cu_seq_q, max_q, scale=scale, is_causal=True)


@torch.no_grad()
@pytest.mark.parametrize("name", ["text", "images", "everything"])
def test_packed_rows_reach_flash_attention_as_lengths(
    tiny: tuple, batches: dict, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(tiny)
    padded = model(**batches[name]).embeddings
    calls = []

    def spy(*states: Tensor, **kwargs: Any) -> Tensor:
        calls.append(kwargs["causal"])
        return flash_varlen(*states, **kwargs)

    spy.__signature__ = flash_utils.inspect.signature(flash_varlen)  # transformers asks what the kernel can do
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: (None, spy, None, None, None))
    monkeypatch.setattr(packing, "takes_lengths", lambda *_: True)
    for tower in (model.vlm.language_model, model.vlm.visual):
        tower.config._attn_implementation = "flash_attention_2"
    packed = model(**batches[name], packing=True).embeddings
    assert calls == [False] * (0 if name == "text" else 2) + [True] * 2  # two layers each
    assert (packed - padded).abs().max() <= TOLERANCE


@pytest.fixture
def registered() -> None:
    """This module's attention under its name: code of a repository that another test loaded registers its own copy."""
    packing.AttentionInterface.register(TORCH_VARLEN, packing.torch_varlen_attention)


@torch.no_grad()
@pytest.mark.parametrize("name", ["text", "everything"])
def test_packed_rows_reach_the_attention_of_torch_as_lengths(
    tiny: tuple, batches: dict, name: str, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = built(tiny)(**batches[name]).embeddings
    model = built(tiny, attn_implementation=TORCH_VARLEN)
    calls = []
    monkeypatch.setattr(packing, "varlen_attn", lambda *x, **kw: calls.append(x[3]) or torch_varlen(*x, **kw))
    assert (model(**batches[name]).embeddings - padded).abs().max() <= TOLERANCE  # without lengths it is sdpa
    assert not calls
    monkeypatch.setattr(packing, "takes_lengths", lambda *_: True)
    packed = model(**batches[name], packing=True).embeddings
    assert len(calls) == 2
    assert calls[0].diff().tolist() == batches[name]["attention_mask"].sum(1).tolist()
    assert (packed - padded).abs().max() <= TOLERANCE


def test_the_attention_of_torch_gets_the_dtype_of_autocast_and_refuses_dropout(
    tiny: tuple, batches: dict, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(tiny, attn_implementation=TORCH_VARLEN)
    dtypes = []
    monkeypatch.setattr(packing, "takes_lengths", lambda *_: True)
    monkeypatch.setattr(packing, "varlen_attn", lambda *x, **kw: dtypes.append(x[0].dtype) or torch_varlen(*x, **kw))
    with torch.autocast("cpu", torch.bfloat16):
        model(**batches["text"], packing=True)
    assert dtypes == [torch.bfloat16] * 2
    model.train()
    for layer in model.vlm.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention dropout is 0.1"):
        model(**batches["text"], packing=True)


@pytest.mark.parametrize(
    ("implementation", "device", "expected"),
    [
        ("flash_attention_2", "cuda", True),
        ("kernels-community/flash-attn2", "cuda", True),
        (TORCH_VARLEN, "cuda", True),
        ("sdpa", "cuda", False),
        ("flash_attention_2", "cpu", False),
    ],
)
def test_packing_pays_where_attention_takes_lengths(
    tiny: tuple, implementation: str, device: str, expected: bool
) -> None:
    config = tiny_vlm_config(tiny[1].tokenizer, 64, 1, 32).text_config
    config._attn_implementation = implementation
    assert takes_lengths(config, torch.device(device)) is expected


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("cuda", "flash", "kernels", "capability", "dtype", "device", "expected"),
    [
        (True, True, True, (9, 0), BF16, "cuda", "flash_attention_2"),
        (True, True, False, (9, 0), torch.float16, "cuda", "flash_attention_2"),
        (True, False, True, (9, 0), BF16, "cuda", "kernels-community/flash-attn2"),
        (True, False, False, (8, 0), BF16, "cuda", TORCH_VARLEN),
        (True, False, False, (7, 5), torch.float16, "cuda", "sdpa"),
        (True, True, True, (9, 0), torch.float32, "cuda", "sdpa"),
        (True, True, True, (9, 0), BF16, "cpu", "sdpa"),
        (False, True, True, (9, 0), BF16, "cuda", "sdpa"),
    ],
)
def test_the_fastest_attention_that_is_there_is_chosen(
    cuda: bool,
    flash: bool,
    kernels: bool,
    capability: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr(packing, "is_kernels_available", lambda: kernels)
    assert choose_attn_implementation(dtype, device) == expected


# --- the trainer


def flat(world: Path, folder: Path) -> Path:
    """The layout that `build` expects."""
    (folder / "base").symlink_to(world / "base")
    (folder / "media").symlink_to(world)
    (folder / "pairs.jsonl").symlink_to(world / "pairs.jsonl")
    return folder


def test_a_step_with_packed_rows_has_the_gradients_of_padded_rows(world: Path, tmp_path: Path) -> None:
    folder, gradients = flat(world, tmp_path), {}
    for packed in ("false", "true"):
        trainer, pairs = build_trainer(folder, "--packing", packed)
        rows = []
        trainer.model.vlm.language_model.register_forward_pre_hook(
            lambda _, __, inputs, rows=rows: rows.append(len(inputs["inputs_embeds"])), with_kwargs=True
        )
        training_step(trainer, list(pairs))
        assert (rows == [1]) == (packed == "true")
        gradients[packed] = gradients_of(trainer)
    assert_same_gradients(gradients["true"], gradients["false"])


def test_packing_is_left_out_where_it_does_not_pay(world: Path, tmp_path: Path) -> None:
    assert not build_trainer(flat(world, tmp_path))[0].packing


@pytest.mark.parametrize(("given", "found"), [(["--packing", "true"], "true"), ([], "auto")])
def test_packing_is_a_flag(given: list[str], found: str) -> None:
    flags = ["--model", "x", "--output_dir", "x", "--use_cpu", "true", *given]
    assert read_arguments(flags)[3].packing == found


def test_a_recipe_may_say_packing_true(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("packing: true\nmodel: x\noutput_dir: x\nuse_cpu: true\n")
    assert read_arguments([str(recipe)])[3].packing == "true"
    with pytest.raises(ValueError, match="`packing` is 'yes'; it must be auto, true or false"):
        read_arguments([str(recipe), "--packing", "yes"])
