"""A mask of hidden rows as the runs of padding that kernels take: one at one end of TOKENS."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["can_look", "padding_runs"]


def can_look(mask: Tensor) -> bool:
    """Whether a value may be looked at: not where that would break the graph or synchronise."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling()


def padding_runs(
    hidden: Tensor, first: int, tokens: int, *, name: str, side: str = "right", elsewhere: str, otherwise: str
) -> tuple[Tensor | None, Tensor | None]:
    """``(token_lengths, token_starts)`` of a segment, at most one of them; both None where nothing is hidden.

    Args:
        hidden: bool (batch, rows), True where a row is padding.
        first, tokens: TOKENS are the rows [first, first + tokens).
        name: of the argument, for errors.
        side: the end at which padding is taken to be where values can't be looked at; there, samples padded otherwise
            come out as NaN (on the CPU: an error).
        elsewhere: what to do, for the error, where padding is at the other end then.
        otherwise: what to use, for the error, instead of other masks.

    Raises:
        ValueError: padding that is not one run at one end of TOKENS.
    """
    region = hidden[:, first : first + tokens]
    count = region.sum(dim=1, dtype=torch.int32)
    right = torch.arange(tokens, device=hidden.device) >= tokens - count[:, None]
    stray = hidden.sum(dim=1) != count
    if can_look(hidden):
        if bool(stray.any()):
            raise ValueError(
                f"{name}: only TOKENS rows, [{first}, {first + tokens}), may be padding, got padding among the memory "
                "or cache rows"
            )
        if not bool(count.any()):
            return None, None
        if torch.equal(region, right):
            return tokens - count, None
        if torch.equal(region, right.flip(1)):
            return None, count
        raise ValueError(
            f"{name}: padding must be one run at one end of TOKENS, the same end in the whole batch; {otherwise}"
        )
    fits = (region == (right if side == "right" else right.flip(1))).all(dim=1) & ~stray
    if hidden.device.type == "cpu":
        torch._assert_async(fits.all(), f"{name}: padding must be on the {side} of TOKENS here; {elsewhere}")
    # A number out of range makes the kernels of other devices write NaN.
    if side == "right":
        return torch.where(fits, tokens - count, -1), None
    return None, torch.where(fits, count, -1)
