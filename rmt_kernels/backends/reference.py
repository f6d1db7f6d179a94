"""The dense reference as a backend: every call, any floating dtype, slowly."""

from __future__ import annotations

import torch

from rmt_kernels.backends.call import Call, check_values
from rmt_kernels.reference import reference_attention
from rmt_kernels.relative import Terms

__all__ = ["run", "supports"]


def supports(call: Call) -> str | None:
    """The reference serves every call."""
    return None


def _widened(terms: Terms, dtype: torch.dtype) -> Terms:
    key, bias, content_bias, position_bias = (None if t is None else t.to(dtype) for t in terms[:4])
    return Terms(key, bias, content_bias, position_bias, terms.reach, terms.shifted)


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)``; float16 and bfloat16 are computed in float32."""
    check_values(call)
    dtype, device = call.query.dtype, call.query.device.type
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        out, lse = reference_attention(
            call.query.to(wide), call.key.to(wide), call.value.to(wide), call.layout,
            cache=None if call.cache is None else (call.cache[0].to(wide), call.cache[1].to(wide)),
            scale=call.scale, token_lengths=call.token_lengths, token_starts=call.token_starts,
            cache_starts=call.cache_starts, query_start=call.query_start, dropout_p=call.dropout_p, seed=call.seed,
            relative=None if call.relative is None else _widened(call.relative, wide),
        )  # fmt: skip
    return out.to(dtype), lse
