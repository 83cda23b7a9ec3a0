"""The faster layers of the vision tower compute what the stock ones do."""

from itertools import groupby

import pytest
import torch
from helpers import build_tiny_model
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention

from vipolyqwen import vision_vipolyqwen
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.vision_vipolyqwen import BatchedVisionAttention, PatchProjection

GRIDS = torch.tensor([[1, 4, 4], [1, 2, 8], [1, 4, 6], [1, 4, 4]])  # runs of 16, 24 and 16 patches


def towers(processor: ViPolyQwenProcessor, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The vision tower of a model, and the stock one with the same weights."""
    ours, stock = (build_tiny_model(processor).to(dtype).vlm.visual for _ in range(2))
    stock.load_state_dict(ours.state_dict())
    classes = {BatchedVisionAttention: VisionAttention, PatchProjection: nn.Conv3d}
    for module in stock.modules():
        module.__class__ = classes.get(type(module), type(module))
    return ours, stock


def pixels_for(tower: nn.Module, dtype: torch.dtype) -> Tensor:
    """Random patches of the images of `GRIDS`."""
    torch.manual_seed(0)
    return torch.randn(int(GRIDS.prod(dim=-1).sum()), tower.patch_embed.proj.weight[0].numel()).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_features_and_gradients_are_those_of_the_stock_tower(
    processor: ViPolyQwenProcessor, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    ours, stock = towers(processor, dtype)
    calls = []
    attend = vision_vipolyqwen.scaled_dot_product_attention
    monkeypatch.setattr(
        vision_vipolyqwen,
        "scaled_dot_product_attention",
        lambda *states, **more: calls.append(states[0].shape[::2]) or attend(*states, **more),
    )
    found, wanted = (tower(pixels_for(tower, dtype), GRIDS).pooler_output for tower in (ours, stock))
    assert calls == [(2, 16), (1, 24), (1, 16)] * len(ours.blocks)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for merged in (found, wanted):
        merged.square().mean().backward()
    for (name, value), other in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_change_of_the_attention_is_followed(
    processor: ViPolyQwenProcessor, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    ours, stock = towers(processor, torch.float32)
    ours.set_attn_implementation(implementation)
    stock_calls = []
    forward = VisionAttention.forward
    monkeypatch.setattr(
        VisionAttention, "forward", lambda *states, **more: stock_calls.append(1) or forward(*states, **more)
    )
    found = ours(pixels_for(ours, torch.float32), GRIDS).pooler_output
    assert len(stock_calls) == (len(ours.blocks) if implementation == "eager" else 0)
    torch.testing.assert_close(found, stock(pixels_for(stock, torch.float32), GRIDS).pooler_output)


def test_the_layers_of_a_pass_ask_once_for_the_sizes_of_its_images(
    processor: ViPolyQwenProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, stock = towers(processor, torch.float32)
    asked = []
    monkeypatch.setattr(vision_vipolyqwen, "groupby", lambda sizes: asked.append(sizes) or groupby(sizes))
    pixels = pixels_for(ours, torch.float32)
    for grids in (GRIDS, GRIDS.flip(0), GRIDS):
        torch.testing.assert_close(ours(pixels, grids).pooler_output, stock(pixels, grids).pooler_output)
    assert asked == [[16, 16, 24, 16], [16, 24, 16, 16], [16, 16, 24, 16]]


def test_patches_are_projected_without_a_convolution(processor: ViPolyQwenProcessor) -> None:
    ours, _ = towers(processor, torch.float32)
    assert type(ours.patch_embed.proj) is PatchProjection
    assert {type(block.attn) for block in ours.blocks} == {BatchedVisionAttention}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.patch_embed(pixels_for(ours, torch.float32))
    assert not [event.name for event in profile.events() if "conv" in event.name]


def test_transforms_of_functions_pass_through_the_tower(processor: ViPolyQwenProcessor) -> None:
    ours, stock = towers(processor, torch.float32)
    pixels = pixels_for(ours, torch.float32)
    for tower in (ours, stock):
        tower.requires_grad_(False)
    found, wanted = (
        torch.func.grad(lambda x, tower=tower: tower(x, GRIDS).pooler_output.square().mean())(pixels)
        for tower in (ours, stock)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    found = torch.func.vmap(lambda x: ours(x, GRIDS).pooler_output)(torch.stack([pixels, -pixels]))
    torch.testing.assert_close(found[1], stock(-pixels, GRIDS).pooler_output, rtol=1e-5, atol=1e-5)
