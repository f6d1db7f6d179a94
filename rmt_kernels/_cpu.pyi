from torch import Tensor

def forward(
    query: Tensor, key: Tensor, value: Tensor, cache_key: Tensor | None, cache_value: Tensor | None,
    token_lengths: Tensor | None, token_starts: Tensor | None, cache_starts: Tensor | None, query_start: Tensor | None,
    seed: Tensor | None, relative_key: Tensor | None, relative_bias: Tensor | None, content_bias: Tensor | None,
    position_bias: Tensor | None, layout: list[int], scale: float, dropout_p: float, relative: tuple[int, ...],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor,
    query: Tensor, key: Tensor, value: Tensor, cache_key: Tensor | None, cache_value: Tensor | None,
    token_lengths: Tensor | None, token_starts: Tensor | None, cache_starts: Tensor | None, query_start: Tensor | None,
    seed: Tensor | None, relative_key: Tensor | None, relative_bias: Tensor | None, content_bias: Tensor | None,
    position_bias: Tensor | None, layout: list[int], scale: float, dropout_p: float, relative: tuple[int, ...],
) -> tuple[Tensor, ...]: ...  # fmt: skip
def rows(
    layout: list[int], token_begin: int, token_end: int, cache_begin: int, query_start: int
) -> list[tuple[int, int, int, int, int]]: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def built_with_torch() -> str: ...
