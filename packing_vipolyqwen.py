"""Packing: the rows of a batch as one sequence without padding, and the attention that keeps them apart."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_kernels_available
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_torch_greater_or_equal

TORCH_VARLEN = "torch_varlen"  # name under which `torch_varlen_attention` is registered with transformers
HAS_TORCH_VARLEN = is_torch_greater_or_equal("2.13", accept_dev=True)  # its earlier forms lack grouped queries

if HAS_TORCH_VARLEN:
    from torch.nn.attention.varlen import varlen_attn


def choose_attn_implementation(dtype: torch.dtype, device: str = "cuda") -> str:
    """Returns the fastest attention available: FlashAttention-2, its build from `kernels`, torch's varlen, or SDPA.

    Args:
        dtype: dtype the model will run in; FlashAttention has no float32.
        device: device type the model will run on.

    Returns:
        A value for `attn_implementation`.
    """
    if device == "cuda" and torch.cuda.is_available() and dtype in (torch.bfloat16, torch.float16):
        if is_flash_attn_2_available():
            return "flash_attention_2"
        if is_kernels_available():
            return "kernels-community/flash-attn2"
        if HAS_TORCH_VARLEN and torch.cuda.get_device_capability() >= (8, 0):  # Ampere
            return TORCH_VARLEN
    return "sdpa"


def takes_lengths(config: PreTrainedConfig, device: torch.device) -> bool:
    """Returns whether the attention of `config` takes the lengths of packed rows; only then does packing save time."""
    varlen = is_flash_attention_requested(config) or config._attn_implementation == TORCH_VARLEN
    return device.type == "cuda" and varlen


def pack(tensor: torch.Tensor | None, mask: torch.Tensor, dim: int = 0) -> torch.Tensor | None:
    """Joins the T positions where `mask` is true, row by row: dimensions (rows, tokens) become (1, T).

    Args:
        tensor: any dtype, rows in dimension `dim` and tokens in the next one; `None` stays `None`.
        mask: (rows, tokens) bool.
        dim: 0, or 1 for position ids (3, rows, tokens).
    """
    if tensor is None:
        return None
    return tensor[mask][None] if dim == 0 else tensor[:, mask][:, None]


def packed_attention(mask: torch.Tensor, position_ids: torch.Tensor, config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the arguments of the language model that keep packed rows from seeing each other.

    An attention that takes lengths gets the cumulative lengths. For any other, transformers builds a block-diagonal
    mask from the positions of the text, a fourth row before Qwen2-VL's three, which restart at 0 with each row.

    Args:
        mask: (rows, tokens) bool, the positions that were packed.
        position_ids: (3, 1, T) long, packed; time, height and width.
        config: configuration of the language model.
    """
    if not takes_lengths(config, mask.device):
        restarting = pack(mask.long().cumsum(dim=-1) - 1, mask)  # (1, T)
        return {"attention_mask": None, "position_ids": torch.cat([restarting[None], position_ids])}
    lengths = mask.sum(dim=-1)
    boundaries = nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).int()  # (rows + 1,)
    longest = int(lengths.max())
    return {
        "attention_mask": None,
        "position_ids": position_ids,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def torch_varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention with torch's varlen kernel if the lengths of packed rows are given, else with SDPA.

    Args:
        module: the layer; its `is_causal` applies if the argument is `None`.
        query: (batch, heads, tokens, head size); batch is 1 for packed rows.
        key: (batch, key heads, tokens, head size); key heads divide the heads (grouped queries).
        value: as `key`.
        attention_mask: mask for SDPA; `None` for packed rows.
        dropout: probability of dropping an attention weight; 0 for packed rows.
        scaling: factor of the scores; `None`: 1 / √(head size).
        is_causal: whether a position sees only itself and those before it in its row.
        sliding_window: most positions that one sees, itself included; `None`: no limit.
        cu_seq_lens_q: (rows + 1,) int32, cumulative lengths of the packed rows, from 0.
        max_length_q: tokens of the longest packed row.
        **kwargs: passed to SDPA.

    Returns:
        (batch, tokens, heads, head size), and `None` in place of the attention weights.

    Raises:
        ValueError: dropout over packed rows.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if dropout > 0:
        raise ValueError(
            f"The attention dropout is {dropout}, but torch's varlen attention supports only 0. Set "
            "`attention_dropout` to 0, train with `packing: false`, or use flash_attention_2."
        )
    device = query.device.type  # under autocast the rotary embedding gives float32
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (T, heads, size)
    causal = module.is_causal if is_causal is None else is_causal
    before = -1 if sliding_window is None else sliding_window - 1
    window = (before, 0 if causal else -1)
    rows = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)  # of queries and of keys
    attended = varlen_attn(query, key, value, *rows, scale=scaling, window_size=window, enable_gqa=True)
    return attended[None], None


if HAS_TORCH_VARLEN:
    AttentionInterface.register(TORCH_VARLEN, torch_varlen_attention)
    AttentionMaskInterface.register(TORCH_VARLEN, sdpa_mask)

__all__ = [
    "TORCH_VARLEN",
    "choose_attn_implementation",
    "pack",
    "packed_attention",
    "takes_lengths",
    "torch_varlen_attention",
]
