"""Options that save memory or time keep the results: gradient checkpointing, bfloat16, torch.compile, Liger."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients, build_trainer, gradients_of, train_run, training_step
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.models.qwen2_vl import modeling_qwen2_vl

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.training import speedups
from vipolyqwen.training.speedups import use_liger_kernels

SHORT = ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--max_steps", "4", "--save_steps", "2"]


@pytest.fixture(scope="module")
def plain(corpus: Path) -> dict[str, Tensor]:
    """Gradients of a step without any of these options."""
    trainer, pairs = build_trainer(corpus)
    training_step(trainer, list(pairs))
    return gradients_of(trainer)


@pytest.mark.parametrize("flags", [[], ["--embed_chunk", "3"], ["--embed_chunk_tokens", "90", "--packing", "true"]])
def test_gradient_checkpointing_keeps_the_gradients(corpus: Path, plain: dict[str, Tensor], flags: list[str]) -> None:
    trainer, pairs = build_trainer(corpus, *flags)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    vlm, calls = trainer.model.vlm, {}
    parts = {"text": vlm.language_model, "text layer": vlm.language_model.layers[0].mlp}
    parts |= {"vision": vlm.visual, "vision layer": vlm.visual.blocks[0].mlp}
    for name, part in parts.items():
        calls[name] = []
        part.register_forward_pre_hook(lambda *_, name=name: calls[name].append(torch.is_grad_enabled()))
    training_step(trainer, list(pairs))
    assert_same_gradients(gradients_of(trainer), plain)
    for tower in ("text", "vision"):  # once, and again in the backward
        assert calls[f"{tower} layer"].count(True) == 2 * calls[tower].count(True) > 0
        assert calls[f"{tower} layer"].count(False) == calls[tower].count(False)
        assert (calls[tower].count(False) > 0) == bool(flags)


def test_bfloat16_with_checkpointing_micro_batches_and_packing_learns_as_float32(world: Path, tmp_path: Path) -> None:
    saving = ["--bf16", "true", "--gradient_checkpointing", "true", "--embed_chunk_tokens", "120", "--packing", "true"]
    losses = {}
    for name, flags in {"plain": [], "saving": saving}.items():
        log = train_run(world, tmp_path / name, *SHORT, "--max_steps", "2", *flags)
        losses[name] = [entry["loss"] for entry in log if "loss" in entry]
        weights = load_file(tmp_path / name / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float32}
    assert losses["saving"] != losses["plain"]
    assert losses["saving"] == pytest.approx(losses["plain"], rel=0.05)


# --- attention without a mask


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_batches_padded_on_the_left_need_a_mask_and_gradients_do_not_differ(
    corpus: Path, plain: dict[str, Tensor], side: str
) -> None:
    trainer, pairs = build_trainer(corpus, "--embed_chunk", "3")
    trainer.processing_class.tokenizer.padding_side = side
    masks = []

    def note(_: nn.Module, __: tuple, kwargs: dict[str, Any]) -> None:
        masks.append((kwargs["attention_mask"] is not None, len(kwargs["inputs_embeds"])))

    trainer.model.vlm.language_model.register_forward_pre_hook(note, with_kwargs=True)
    training_step(trainer, list(pairs))
    assert_same_gradients(gradients_of(trainer), plain)
    assert {masked for masked, rows in masks if rows > 1} == {side == "left"}


# --- compiled layers


def test_compiled_layers_learn_the_same_in_one_graph_and_resume(world: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = ["--torch_compile", "true", "--torch_compile_backend", "eager", "--embed_chunk", "5"]
    weights = {}
    for name, flags in {"plain": ["--embed_chunk", "5"], "compiled": compiled}.items():
        train_run(world, tmp_path / name, *SHORT, *flags)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert weights["compiled"].keys() == weights["plain"].keys()
    for name, value in weights["plain"].items():
        torch.testing.assert_close(weights["compiled"][name], value, atol=1e-4, rtol=1e-4)
    checkpoint = str(tmp_path / "compiled" / "checkpoint-2")
    train_run(world, tmp_path / "resumed", *SHORT, *compiled, "--resume_from_checkpoint", checkpoint)
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in weights["compiled"].items())


def test_compiled_layers_may_be_checkpointed(corpus: Path, plain: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    counters.clear()
    trainer, pairs = build_trainer(
        corpus, "--torch_compile", "true", "--torch_compile_backend", "eager", "--packing", "true"
    )
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    training_step(trainer, list(pairs))
    assert counters["stats"]["unique_graphs"] > 0
    assert_same_gradients(gradients_of(trainer), plain)


# --- Liger


def test_liger_kernels_need_liger_and_cuda(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedups, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="`use_liger_kernel` is true.*liger-kernel is not installed"):
        build_trainer(corpus, "--use_liger_kernel", "true")
    monkeypatch.setattr(speedups, "is_liger_kernel_available", lambda: True)
    with pytest.raises(ValueError, match="`use_liger_kernel` is true.* cpu; .*CUDA"):
        build_trainer(corpus, "--use_liger_kernel", "true")


class LigerRMSNorm(nn.Module):
    """A stand-in for the class of this name in Liger, which needs CUDA."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class LigerSwiGLUMLP(nn.Module):
    """A stand-in for the class of this name in Liger, which needs CUDA."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def test_liger_layers_keep_the_weights(
    corpus: Path, plain: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rotary = modeling_qwen2_vl.apply_rotary_pos_emb
    rotations = []
    module = ModuleType("liger_kernel.transformers")
    module.LigerRMSNorm, module.LigerSwiGLUMLP = LigerRMSNorm, LigerSwiGLUMLP
    module.liger_rotary_pos_emb = lambda *states: rotations.append(0) or rotary(*states)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(speedups, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(modeling_qwen2_vl, "apply_rotary_pos_emb", rotary)  # put back afterwards
    model = ViPolyQwenModel.from_pretrained(corpus / "base")
    before = list(model.state_dict())
    use_liger_kernels(model, SimpleNamespace(type="cuda"))
    assert list(model.state_dict()) == before
    kinds = [type(part) for part in model.vlm.language_model.modules()]
    layers = len(model.vlm.language_model.layers)
    assert (kinds.count(LigerRMSNorm), kinds.count(LigerSwiGLUMLP)) == (2 * layers + 1, layers)
    trainer, pairs = build_trainer(corpus, model=model)
    training_step(trainer, list(pairs))
    assert rotations
    assert_same_gradients(gradients_of(trainer), plain)
