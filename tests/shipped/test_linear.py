"""Linear layers by oneDNN: same values and gradients, only where they pay, invisible to what handles `nn.Linear`."""

import copy
import pickle
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_tiny_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vipolyqwen import linear_vipolyqwen
from vipolyqwen.linear_vipolyqwen import Linear, linear, use_onednn
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.vision_vipolyqwen import PatchProjection

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch lacks oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the values that oneDNN multiplies, with all products large enough for it on any machine."""
    seen: list[tuple[int, ...]] = []
    stock = linear_vipolyqwen._by_onednn

    def spy(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(values.shape))
        return stock(values, weight, bias)

    for name, value in {"ONEDNN_IS_FASTER": True, "FEWEST_PRODUCTS": 0, "FEWEST_PRODUCTS_WITH_GRADIENT": 0}.items():
        monkeypatch.setattr(linear_vipolyqwen, name, value)
    monkeypatch.setattr(linear_vipolyqwen, "_by_onednn", spy)
    return seen


def layers(bias: bool = True) -> tuple[nn.Linear, Linear]:
    """The stock layer and this one with the same weights."""
    torch.manual_seed(0)
    stock = nn.Linear(5, 3, bias=bias)
    ours = copy.deepcopy(stock)
    use_onednn(ours)
    assert type(ours) is Linear
    return stock, ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5), (2, 1, 3, 5), (1, 5)])
def test_values_and_gradients_are_those_of_the_stock_layer(
    calls: list[Any], shape: tuple[int, ...], bias: bool
) -> None:
    results = []
    for layer in layers(bias):
        torch.manual_seed(1)
        values = torch.randn(shape, requires_grad=True)
        found = layer(values)
        (found.square() * torch.arange(3)).sum().backward()
        results.append([found, values.grad, *(parameter.grad for parameter in layer.parameters())])
    assert calls[0] == shape
    for found, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, wanted)


def test_second_derivatives_are_those_of_the_stock_layer(calls: list[Any]) -> None:
    results = []
    for layer in layers():
        values = torch.linspace(-1, 1, 20).view(4, 5).requires_grad_()
        (first,) = torch.autograd.grad(layer(values).pow(3).sum(), values, create_graph=True)
        first.square().sum().backward()
        results.append([first, values.grad, layer.weight.grad, layer.bias.grad])
    assert calls
    for found, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("transposed", [True, False])
def test_strided_and_expanded_values_are_read_as_they_lie(calls: list[Any], transposed: bool) -> None:
    stock, ours = layers()
    values = torch.randn(5, 4).t() if transposed else torch.randn(1, 5).expand(4, 5)
    with torch.inference_mode():
        torch.testing.assert_close(ours(values), stock(values))
    ours(values.requires_grad_()).sum().backward()  # the gradient is an expanded number
    stock(values).sum().backward()
    torch.testing.assert_close(ours.weight.grad, stock.weight.grad)
    assert len(calls) >= 2


def test_only_float32_on_the_cpu_outside_autocast_and_tracing_passes_through_onednn(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, layer = layers()
    values = torch.randn(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(values).dtype == torch.bfloat16
    assert copy.deepcopy(layer).bfloat16()(values.bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(layer).to("meta")(values.to("meta")).is_meta
    assert layer(torch.randn(0, 5)).shape == (0, 3)
    assert layer(torch.randn(5)).shape == (3,)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        layer(values)
    with torch.backends.mkldnn.flags(enabled=False):
        layer(values)
    with FlopCounterMode(display=False) as counter:
        layer(values)
    assert counter.get_total_flops() == 2 * 2 * 5 * 3
    torch.jit.trace(layer, values, check_trace=False)
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(2, 4))
    assert calls == []
    layer(values)
    assert set(calls) == {(2, 5)}


def test_small_products_and_other_machines_keep_the_stock_function(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(100, 100)
    monkeypatch.setattr(linear_vipolyqwen, "FEWEST_PRODUCTS", 10 * weight.numel())
    monkeypatch.setattr(linear_vipolyqwen, "FEWEST_PRODUCTS_WITH_GRADIENT", 20 * weight.numel())
    for rows in (2, 3, 12, 13):
        with torch.inference_mode():
            linear(torch.randn(rows, 100), weight, None)
        linear(torch.randn(rows, 100), weight, None)
    assert [shape[0] for shape in calls] == [3, 12, 13, 13, 13]  # with gradient once more, in its forward
    monkeypatch.setattr(linear_vipolyqwen, "ONEDNN_IS_FASTER", False)
    calls.clear()
    linear(torch.randn(64, 100), weight, None)
    plain = nn.Linear(2, 2)
    use_onednn(plain)
    assert calls == []
    assert type(plain) is nn.Linear


@pytest.mark.parametrize(
    ("found", "faster"),
    [
        ({"cpu_name": "AMD EPYC 9654 96-Core Processor", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC 7763 64-Core Processor", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Platinum 8480+", "avx512_f": True}, False),
        ({"cpu_name": "Neoverse-V2", "sve": True}, False),
    ],
)
def test_onednn_is_chosen_by_the_processor(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], faster: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert linear_vipolyqwen._onednn_is_faster() is faster
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert linear_vipolyqwen._onednn_is_faster() is False


class Doubled(nn.Linear):
    """A layer with its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_keep_names_copies_and_subclasses(calls: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 2), nn.LayerNorm(2))
    names = list(model.state_dict())
    use_onednn(model)
    assert [type(module) for module in model] == [Linear, Doubled, nn.LayerNorm]
    assert list(model.state_dict()) == names
    assert repr(model[0]) == repr(nn.Linear(4, 4))
    values = torch.randn(3, 4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(values), model(values))


def test_the_vectors_and_gradients_of_a_model_are_the_same_to_rounding(
    processor: ViPolyQwenProcessor, calls: list[Any]
) -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 6, 5, 4]]), "attention_mask": torch.ones(2, 4).long()}
    torch.manual_seed(0)
    ours = build_tiny_model(processor).eval()
    found = ours(**batch).embeddings
    found[:, 0].sum().backward()
    with torch.inference_mode():
        torch.testing.assert_close(ours(**batch).embeddings, found.detach(), rtol=0, atol=1e-6)
    assert calls
    gradients = {name: value.grad for name, value in ours.named_parameters() if value.grad is not None}
    ours.zero_grad()
    for module in ours.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear
    calls.clear()
    wanted = ours(**batch).embeddings
    wanted[:, 0].sum().backward()
    assert calls == []
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    for name, value in ours.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(gradients[name], value.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_adapters_take_and_merge_these_layers(calls: list[Any]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    use_onednn(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    values = torch.randn(3, 4)
    wanted = adapted(values)
    merged = adapted.merge_and_unload()
    assert type(merged[0]) is Linear
    torch.testing.assert_close(merged(values), wanted)
    assert "peft" in sys.modules


def _of_forward_mode(layer: nn.Module, values: Tensor) -> Tensor:
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(values, values))).tangent


@pytest.mark.parametrize(
    "derive",
    [
        _of_forward_mode,
        lambda layer, values: torch.func.vmap(layer)(values.view(2, 2, 5)),
        lambda layer, values: torch.func.jvp(layer, (values,), (values,))[1],
        lambda layer, values: torch.func.jacrev(layer)(values),
        lambda layer, values: torch.fx.symbolic_trace(nn.Sequential(layer))(values),
        lambda layer, values: torch.autograd.grad(
            layer(values), layer.weight, torch.arange(24.0).view(2, 4, 3), is_grads_batched=True
        )[0],
    ],
    ids=["forward mode", "vmap", "jvp", "jacrev", "fx", "batch of gradients"],
)
def test_transforms_of_functions_give_the_values_of_the_stock_layer(calls: list[Any], derive: Any) -> None:
    values = torch.linspace(-1, 1, 20).view(4, 5)
    wanted, found = (derive(layer, values) for layer in layers())
    torch.testing.assert_close(found, wanted)


def test_a_frozen_layer_keeps_no_activations_and_a_first_layer_not_its_weight(calls: list[Any]) -> None:
    for stock_or_ours in layers():
        kept: list[tuple[int, ...]] = []

        def keep(values: Tensor, kept: list[tuple[int, ...]] = kept) -> Tensor:
            kept.append(tuple(values.shape))
            return values

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
            stock_or_ours(torch.randn(4, 5))
            stock_or_ours.requires_grad_(False)(torch.randn(2, 5, requires_grad=True))
        assert len(kept) == 2  # the values alone, then the weight alone
        assert kept[0] == (4, 5)
        assert sorted(kept[1]) == [3, 5]
    assert calls


@pytest.mark.filterwarnings("ignore")
def test_tables_of_layers_by_class_hold_these_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_vipolyqwen, "ONEDNN_IS_FASTER", True)
    assert Linear == nn.Linear
    assert Linear in {nn.Linear: 1}
    assert Linear != Doubled
    assert type("Derived", (Linear,), {}) not in {nn.Linear: 1, Linear: 1}
    _, ours = layers()
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(ours), {nn.Linear})
    assert isinstance(quantized[0], torch.ao.nn.quantized.dynamic.Linear)


def test_layers_change_their_class_after_quantizers_have_seen_them(
    tmp_path: Path, processor: ViPolyQwenProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_vipolyqwen, "ONEDNN_IS_FASTER", True)
    build_tiny_model(processor).save_pretrained(tmp_path)
    seen: list[type] = []
    prepare = ViPolyQwenModel.post_init
    monkeypatch.setattr(
        ViPolyQwenModel,
        "post_init",
        lambda model: seen.extend(type(m) for m in model.modules() if isinstance(m, nn.Linear)) or prepare(model),
    )
    loaded = ViPolyQwenModel.from_pretrained(tmp_path)
    pickled = pickle.loads(bytes(ForkingPickler.dumps(loaded)))
    assert len(seen) > 10
    assert all(kind is nn.Linear for kind in seen)
    for model in (loaded, pickled):
        assert not [name for name, module in model.named_modules() if type(module) is nn.Linear]
        assert type(model.vlm.visual.patch_embed.proj) is PatchProjection
