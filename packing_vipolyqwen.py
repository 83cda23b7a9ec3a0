"""Rows of a batch as one sequence without padding, and the attention that keeps them apart."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_kernels_available
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_torch_greater_or_equal

TORCH_VARLEN = "torch_varlen"  # name of the attention below, beside transformers' own
HAS_TORCH_VARLEN = is_torch_greater_or_equal("2.13", accept_dev=True)  # its earlier forms lack grouped queries

if HAS_TORCH_VARLEN:
    from torch.nn.attention.varlen import varlen_attn


def choose_attn_implementation(dtype: torch.dtype, device: str = "cuda") -> str:
    """The fastest attention that is there: FlashAttention-2, its build from `kernels`, torch's own, or sdpa.

    Args:
        dtype: dtype the model will run in; FlashAttention has no float32.
        device: device type the model will run on.
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
    """Whether the attention of `config` finds the rows of one sequence by their lengths, which makes packing pay."""
    varlen = is_flash_attention_requested(config) or config._attn_implementation == TORCH_VARLEN
    return device.type == "cuda" and varlen


def pack(tensor: torch.Tensor | None, mask: torch.Tensor, dim: int = 0) -> torch.Tensor | None:
    """The T positions where `mask` (rows, tokens) is true, row by row, as one row: dimensions (rows, tokens) → (1, T).

    Args:
        tensor: with rows in dimension `dim` and tokens in the one after it; `None` stays `None`.
        mask: (rows, tokens) bool.
        dim: 0, or 1 for position ids (3, rows, tokens).
    """
    if tensor is None:
        return None
    return tensor[mask][None] if dim == 0 else tensor[:, mask][:, None]


def packed_attention(mask: torch.Tensor, position_ids: torch.Tensor, config: PreTrainedConfig) -> dict[str, Any]:
    """What the language model needs so that no packed row sees another.

    An attention that takes lengths gets these; for any other transformers builds a block-diagonal mask where the
    positions of the text, a fourth row before the three of Qwen2-VL's grid, start anew.

    Args:
        mask: (rows, tokens) bool, the positions that were packed.
        position_ids: (3, 1, T) long, packed.
        config: the language model's.
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
    """Attention of torch over packed rows where their lengths are given, sdpa where they are not.

    Args:
        module: the layer; its `is_causal` counts if the argument is not given.
        query: (batch, heads, tokens, head size); batch is 1 for packed rows.
        key: likewise, perhaps with fewer heads.
        value: as `key`.
        attention_mask: sdpa's; packed rows have none.
        dropout: of attention weights; packed rows cannot have it.
        scaling: factor of the scores.
        is_causal: whether a position sees only those before it in its row.
        sliding_window: how many positions one sees at most, itself included.
        cu_seq_lens_q: (rows + 1,) int32, where each packed row begins and the last one ends.
        max_length_q: tokens of the longest packed row.
        **kwargs: for sdpa.

    Returns:
        (batch, tokens, heads, head size), and no weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if dropout > 0:
        raise ValueError(
            f"The attention dropout is {dropout}, but torch's attention over packed rows has none. Set "
            "`attention_dropout` to 0, train with `packing: false`, or use flash_attention_2."
        )
    kind = query.device.type  # the rotary embedding leaves autocast's dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (T, heads, size)
    causal = module.is_causal if is_causal is None else is_causal
    before = -1 if sliding_window is None else sliding_window - 1
    attended = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(before, 0 if causal else -1),
        enable_gqa=True,
    )
    return attended[None], None


if HAS_TORCH_VARLEN:
    AttentionInterface.register(TORCH_VARLEN, torch_varlen_attention)
    AttentionMaskInterface.register(TORCH_VARLEN, sdpa_mask)
