"""Poolings and projections: the formulas of the papers, by hand."""

import numpy as np
import pytest
import torch
from helpers import shake
from torch import Tensor

from vipolyqwen.pooling_vipolyqwen import AttentionPooling, LastPooling, LinearProjection, MeanPooling, MLPProjection

NAN = float("nan")
HIDDEN = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]])  # (1, 3, 2)


def test_attention_pooling_is_the_softmax_of_the_scores_with_the_query() -> None:
    pooling = AttentionPooling(2)
    pooling.query.data = torch.tensor([1.0, 0.5])  # u = 1, 1, 5; e^1 : e^1 : e^5 = 1 : 1 : e^4
    pooled, weights = pooling(HIDDEN, torch.ones(1, 3, dtype=torch.bool))
    total = 2 + np.exp(4)
    expected = torch.tensor([[1 / total, 1 / total, np.exp(4) / total]], dtype=torch.float32)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(pooled, torch.tensor([[1 + 3 * np.exp(4), 2 + 4 * np.exp(4)]]).float() / total)


def test_attention_pooling_computes_its_softmax_in_float32() -> None:
    pooling = AttentionPooling(2).bfloat16()
    pooling.query.data = torch.tensor([1.0, 0.5], dtype=torch.bfloat16)
    pooled, weights = pooling(HIDDEN.bfloat16(), torch.ones(1, 3, dtype=torch.bool))
    assert pooled.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0, np.exp(4)]], dtype=torch.float32) / (2 + np.exp(4)))


def test_mean_pooling_is_the_mean_of_the_real_positions() -> None:
    pooled, weights = MeanPooling(2)(HIDDEN, torch.tensor([[False, True, True]]))
    torch.testing.assert_close(pooled, torch.tensor([[1.5, 3.0]]))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.5, 0.5]]))


@pytest.mark.parametrize(
    ("mask", "last"), [([1, 1, 1], 2), ([1, 1, 0], 1), ([1, 0, 0], 0), ([0, 1, 1], 2), ([0, 0, 1], 2)]
)
def test_last_pooling_takes_the_last_real_position_on_either_padding_side(mask: list, last: int) -> None:
    pooled, weights = LastPooling(2)(HIDDEN, torch.tensor([mask]).bool())
    torch.testing.assert_close(pooled, HIDDEN[:, last])
    assert weights[0].tolist() == [float(i == last) for i in range(3)]


@pytest.mark.parametrize("pooling_class", [AttentionPooling, MeanPooling, LastPooling])
@pytest.mark.parametrize("junk", [NAN, float("inf"), -1e30])
def test_pooling_ignores_whatever_a_masked_position_holds(pooling_class: type, junk: float) -> None:
    pooling = pooling_class(2)
    for parameter in pooling.parameters():
        torch.nn.init.constant_(parameter, 0.3)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    clean = HIDDEN.repeat(2, 1, 1)
    dirty = clean.masked_fill(~mask[..., None], junk).requires_grad_()
    pooled, weights = pooling(dirty, mask)
    expected, _ = pooling(clean, mask)
    torch.testing.assert_close(pooled, expected)
    assert (weights[~mask] == 0).all()
    pooled.sum().backward()
    assert dirty.grad[mask].isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in pooling.parameters())


def test_linear_projection_is_a_layer_norm_of_a_matrix_without_bias() -> None:
    projection = LinearProjection(2, 4)
    assert [name for name, _ in projection.named_parameters()] == ["dense.weight", "norm.weight", "norm.bias"]
    projection.dense.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    expected = torch.tensor([[3.0, 1.0, 4.0, 2.0]])  # W (3, 1); mean 2.5, variance 1.25
    torch.testing.assert_close(projection(torch.tensor([[3.0, 1.0]])), (expected - 2.5) / np.sqrt(1.25 + 1e-5))


def test_mlp_projection_is_two_layers_with_norms_and_gelu() -> None:
    torch.manual_seed(0)
    projection = shake(MLPProjection(6, 4))
    weights = dict(projection.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    pooled = torch.randn(3, 6)
    inner = norm(pooled @ weights["dense_in.weight"].T + weights["dense_in.bias"], "norm_in")
    inner = inner * 0.5 * (1 + torch.erf(inner / np.sqrt(2)))
    expected = norm(inner @ weights["dense_out.weight"].T + weights["dense_out.bias"], "norm")
    torch.testing.assert_close(projection(pooled), expected)
