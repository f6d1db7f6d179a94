"""The shared suite: cases, how one is run on a backend, and the rule its errors must keep.

Every backend runs the same cases against ``reference_attention`` in float64. A case drawn at random is reproduced from
the number at the front of its id: ``draws.draw(17)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rmt_kernels import Region, Relative, SegmentLayout, attention, reference, reference_attention
from rmt_kernels.backends import cuda
from rmt_kernels.philox import dropout_keep
from rmt_kernels.reference import segment_mask
from tests.emulation import EMULATED
from tests.interpreter import INTERPRETED

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPE_NAMES = {F16: "f16", BF16: "bf16", F32: "f32", F64: "f64"}
# RMS error over RMS of the result; gradients may have twice that.
RMS_TOLERANCE = {BF16: 5e-3, F16: 1e-3, F32: 1e-5}


@dataclass(frozen=True)
class Backend:
    """A backend under test. A kernel backend must serve every case, repeat itself bit for bit, and so on."""

    name: str
    device: str = "cpu"
    kernels: bool = False
    factor: float = 2.0  # its largest error may be this many times eager PyTorch's in the same dtype
    interpreted: bool = False  # thousands of times slower: it runs smaller cases, and fewer
    dtypes: tuple[torch.dtype, ...] = ()  # all that it serves; (): all

    def typed(self, case: Case) -> Case:
        """The case in a dtype that this backend serves."""
        if not self.dtypes or case.dtype in self.dtypes:
            return case
        return replace(case, dtype=self.dtypes[case.seed % len(self.dtypes)])

    def version(self, case: Case) -> Case:
        """The case as this backend runs it: in the interpreter with few samples and heads, which hold nothing new."""
        case = self.typed(case)
        if not self.interpreted:
            return case
        whole_range = case.padding or case.stale or case.start  # both ends and something between
        return replace(case, batch=min(case.batch, 3 if whole_range else 1), kv_heads=min(case.kv_heads, 1))


# What was compiled of the CUDA backend.
INSTANCES: list[tuple[str, int]] = [] if cuda.why_missing else cuda.module.built()["instances"]
CUDA_DTYPES = tuple(dtype for dtype in (BF16, F16) if DTYPE_NAMES[dtype] in {name for name, _ in INSTANCES})

BACKENDS = (
    Backend("cpu", kernels=True),
    Backend("cuda", "cpu" if EMULATED else "cuda", kernels=True, dtypes=CUDA_DTYPES),
    Backend("triton", "cpu" if INTERPRETED else "cuda", kernels=True, interpreted=INTERPRETED),
    Backend("stock", factor=5.0),  # the exponential in PyTorch's fused CPU attention is good to 20 bits only
    Backend("reference"),
)
KERNELS = tuple(backend for backend in BACKENDS if backend.kernels)


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """``torch.empty`` and C++'s ``at::empty`` give NaN (the largest number for integers)."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


# The tensors of a Relative, and its mode.
RELATIVE: dict[str, tuple[tuple[str, ...], str]] = {
    "transformer-xl": (("key", "content_bias", "position_bias"), "clean"),
    "shifted": (("key", "content_bias", "position_bias"), "shifted"),
    "key": (("key",), "clean"),
    "bias": (("bias",), "clean"),
    "content": (("content_bias",), "clean"),
    "all": (("key", "content_bias", "position_bias", "bias"), "clean"),
    "all shifted": (("key", "position_bias", "bias"), "shifted"),
}

# -- cases -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of ``segment_attention`` with gradients; everything in it is decided by these fields."""

    layout: SegmentLayout
    batch: int = 2
    kv_heads: int = 2
    group: int = 1  # query heads per key/value head
    head_dim: int = 32
    dtype: torch.dtype = F32
    padding: str = ""  # TOKENS padded on the "right", the "left", or not
    stale: bool = False  # cache_starts given
    start: bool = False  # query_start given
    apart: bool = False  # CACHE given as cache=
    dropout_p: float = 0.0
    scale: float | None = None
    strides: str = "plain"  # how query, key and value lie in memory: see _lay
    grads: str = "both"  # gradients flow from "both" out and lse, "out" alone, "lse" alone, or out's "sum"
    relative: str = ""  # distance-dependent scores: a key in RELATIVE
    scores: str = "random"  # "random"; "large": inputs x 50; "low": every score is -2^20 / sqrt(head_dim)
    seed: int = 0

    @property
    def label(self) -> str:
        """A readable id."""
        sizes = "+".join(str(self.layout.size(region)) for region in Region)
        words = [
            self.layout.name, sizes, DTYPE_NAMES[self.dtype],
            f"{self.batch}x{self.kv_heads}x{self.group}x{self.head_dim}", self.padding,
        ]  # fmt: skip
        words += [f"window{self.layout.window}"] if self.layout.window else []
        words += [f"skip{self.layout.skip}"] if self.layout.skip else []
        words += [name for name in ("stale", "start", "apart") if getattr(self, name)]
        words += [f"relative {self.relative}"] if self.relative else []
        words += [f"dropout{self.dropout_p}"] if self.dropout_p else []
        words += [f"scale{self.scale}"] if self.scale is not None else []
        words += [word for word in (self.strides, self.grads, self.scores) if word not in ("plain", "both", "random")]
        return "-".join(word for word in words if word)


@dataclass
class Problem:
    """A case's tensors. ``inputs`` are leaves with the memory layout that the case asks for."""

    case: Case
    inputs: dict[str, Tensor]  # query, key, value; where there are any cache_key, cache_value, relative_key and so on
    options: dict[str, Any]  # the keyword arguments of both segment_attention and reference_attention
    grad_out: Tensor | None
    grad_lse: Tensor | None

    def relative(self, tensors: dict[str, Tensor]) -> Relative:
        """The case's Relative, made of these tensors."""
        names, mode = RELATIVE[self.case.relative]
        return Relative(**{name: tensors[f"relative_{name}"] for name in names}, mode=mode)

    def arguments(self, dtype: torch.dtype | None = None) -> tuple[list[Tensor], dict[str, Any], list[Tensor]]:
        """``(positional, keywords, leaves)`` for a call in ``dtype`` (default: the case's)."""
        dtype = self.case.dtype if dtype is None else dtype
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.inputs.items()}
        options = dict(self.options)
        if self.case.apart:
            options["cache"] = (leaves["cache_key"], leaves["cache_value"])
        if self.case.relative:
            options["relative"] = self.relative(leaves)
        return [leaves["query"], leaves["key"], leaves["value"]], options, list(leaves.values())


def _lay(tensor: Tensor, strides: str, which: str) -> Tensor:
    """The same values, or for "expanded" a part of them repeated, in another order of memory."""
    batch, heads, rows, head_dim = tensor.shape
    if strides == "plain":
        return tensor.contiguous()
    if strides == "projected":  # (batch, rows, heads, head_dim) seen as (batch, heads, rows, head_dim)
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "sliced":  # rows that neither follow one another nor start at an aligned address
        wide = tensor.new_full((batch, heads, rows, head_dim + 3), float("nan"))
        wide[..., 1 : head_dim + 1] = tensor
        return wide[..., 1 : head_dim + 1]
    if strides == "column":  # the last dimension is not contiguous
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if strides == "expanded" and tensor.numel():
        part = {"query": tensor[:, :1], "key": tensor[:1], "value": tensor[:, :1]}.get(which, tensor[:1, :1])
        return part.contiguous().expand(tensor.shape)
    return tensor


def make(case: Case, device: str = "cpu") -> Problem:
    """The tensors of a case."""
    layout, batch = case.layout, case.batch
    generator = torch.Generator().manual_seed(case.seed)

    def normal(heads: int, rows: int) -> Tensor:
        return torch.randn(batch, heads, rows, case.head_dim, generator=generator)

    heads = case.kv_heads * case.group
    query = normal(heads, layout.num_queries)
    key, value = normal(case.kv_heads, layout.num_keys), normal(case.kv_heads, layout.num_keys)
    if case.scores == "large":
        query, key = 50 * query, 50 * key
    elif case.scores == "low":
        query, key = torch.zeros_like(query), torch.zeros_like(key)
        query[..., 0], key[..., 0] = -1024.0, 1024.0
    tensors = {"query": query, "key": key, "value": value}
    if case.apart:
        size = layout.key_size("cache")
        tensors = {
            "query": query, "key": key[:, :, size:], "value": value[:, :, size:],
            "cache_key": key[:, :, :size], "cache_value": value[:, :, :size],
        }  # fmt: skip
    inputs = {name: _lay(tensor.to(case.dtype).to(device), case.strides, name) for name, tensor in tensors.items()}
    if case.relative:
        rows = layout.num_keys + 1 + case.seed % 3
        sizes: dict[str, tuple[int, ...]] = {"key": (rows, case.head_dim), "bias": (rows,)}
        for name in RELATIVE[case.relative][0]:
            drawn = torch.randn(heads, *sizes.get(name, (case.head_dim,)), generator=generator)
            inputs[f"relative_{name}"] = drawn.to(case.dtype).to(device)

    def per_batch(most: int) -> Tensor:
        """Both ends of the range where the batch is long enough, then anything between."""
        drawn = torch.randint(0, most + 1, (batch,), generator=generator)
        drawn[1:2], drawn[2:3] = 0, most
        return drawn.to(device, torch.int32)

    options: dict[str, Any] = {"scale": case.scale, "dropout_p": case.dropout_p}
    if case.padding:
        options["token_lengths" if case.padding == "right" else "token_starts"] = per_batch(layout.tokens)
    if case.stale:
        options["cache_starts"] = per_batch(layout.cache)
    if case.start:
        options["query_start"] = per_batch(layout.tokens - layout.num_queries)
    if case.dropout_p:
        options["seed"] = torch.tensor([-(2**40) - 7 * case.seed - 3], device=device)

    grad_out = None if case.grads == "lse" else normal(heads, layout.num_queries).to(case.dtype).to(device)
    if case.grads == "sum":  # what `out.sum().backward()` sends: one number with strides 0
        grad_out = torch.ones((), dtype=case.dtype, device=device).expand(
            batch, heads, layout.num_queries, case.head_dim
        )
    elif grad_out is not None:
        grad_out = _lay(grad_out, case.strides if case.strides != "expanded" else "plain", "grad_out")
    grad_lse = None
    if case.grads in ("both", "lse"):
        grad_lse = torch.randn(batch, heads, layout.num_queries, generator=generator).to(device)
    return Problem(case, inputs, options, grad_out, grad_lse)


# -- running a case ----------------------------------------------------------------------------------------------------

Attention = Callable[..., tuple[Tensor, Tensor]]
Results = dict[str, Tensor]


def results(problem: Problem, compute: Attention, dtype: torch.dtype | None = None, with_lse: bool = True) -> Results:
    """out, lse and the gradient of every input, as ``compute`` gives them in ``dtype``."""
    positional, options, leaves = problem.arguments(dtype)
    out, lse = compute(*positional, problem.case.layout, **options)
    outputs, grads = [], []
    if problem.grad_out is not None:
        outputs.append(out)
        grads.append(problem.grad_out.to(out.dtype))
    if with_lse and problem.grad_lse is not None:
        outputs.append(lse)
        grads.append(problem.grad_lse.to(lse.dtype))
    found = {"out": out.detach()} | ({"lse": lse.detach()} if with_lse else {})
    gradients = torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)
    return found | {f"grad {name}": gradient for name, gradient in zip(problem.inputs, gradients, strict=True)}


def on_backend(name: str, with_lse: bool = True) -> Attention:
    """``segment_attention`` on a named backend, returning (out, lse)."""
    options = {"return_lse": with_lse, "backend": name}

    def compute(*args: Any, **given: Any) -> tuple[Tensor, Tensor]:
        call: Any = attention.segment_attention
        found = call(*args, **given, **options)
        return found if with_lse else (found, found.new_empty(0))

    return compute


def refusal(name: str, problem: Problem, with_lse: bool) -> str | None:
    """Why the backend does not serve the call, or None."""
    positional, options, _ = problem.arguments()
    names = ("cache", "token_lengths", "token_starts", "cache_starts", "query_start", "seed", "relative")
    checked: Any = attention._checked
    given = dict.fromkeys(names) | options | {"return_lse": with_lse}
    reason: str | None = attention._BACKENDS[name].supports(checked(*positional, problem.case.layout, **given))
    return reason


# -- the rule ----------------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What float64 gives, and what PyTorch's own arithmetic and one rounding of every term would miss it by."""

    exact: Results
    stock: Results  # eager PyTorch in the dtype of the case
    single: Results  # eager PyTorch in float32
    noise: Results  # what one rounding of every term does
    blind: Tensor  # rows that see nothing, bool (batch, queries)
    unseen: Tensor  # keys that no row sees, bool (batch, keys)


@lru_cache(maxsize=4)
def expected(case: Case, with_lse: bool = True) -> Expected:
    """What is asked of the case's results; kept for the backends that run the case one after another."""
    problem = make(case)
    whole = results(problem, reference_attention, F64)
    exact = whole if with_lse else results(problem, reference_attention, F64, with_lse)
    single = results(problem, reference_attention, F32, with_lse)
    stock = single if case.dtype is F32 else results(problem, reference_attention, case.dtype, with_lse)
    padding = {
        name: problem.options.get(name) for name in ("token_lengths", "token_starts", "cache_starts", "query_start")
    }
    mask, rows = segment_mask(case.layout, case.batch, torch.device("cpu"), **padding)
    noise = _noise(problem, whole, mask[:, None], rows, with_lse)
    return Expected(exact, stock, single, noise, ~mask.any(dim=2), ~mask.any(dim=1))


class _Squares:
    """Scores with every factor squared, in which a case with ``relative`` is linear: what rounding moves."""

    def __init__(
        self, problem: Problem, inputs: dict[str, Tensor], key: Tensor, offsets: Tensor | None, blind: Tensor
    ) -> None:
        self.problem, self.blind, query = problem, blind, inputs["query"]
        content = query + inputs["relative_content_bias"][:, None] if "relative_content_bias" in inputs else query
        position = query + inputs["relative_position_bias"][:, None] if "relative_position_bias" in inputs else query
        self.factors = {"content": content**2, "keys": key**2, "position": position**2} | {
            name: inputs[name] ** 2 for name in ("relative_key", "relative_bias") if name in inputs
        }
        for factor in self.factors.values():
            factor.requires_grad_(bool(problem.case.relative))
        self.scores = self.factors["content"] @ self.factors["keys"].mT
        self.bias = torch.zeros_like(self.scores)
        if "relative_key" in inputs:
            self.scores = self.scores + self._table(key, offsets, key=self.factors["relative_key"])
        if "relative_bias" in inputs:
            self.bias = self._table(key, offsets, bias=self.factors["relative_bias"])

    def _table(self, key: Tensor, offsets: Tensor | None, /, **table: Tensor) -> Tensor:
        mode, position = RELATIVE[self.problem.case.relative][1], self.factors["position"]
        terms = Relative(**table, mode=mode).terms(self.problem.case.layout, position)
        return reference._scores(position, torch.zeros_like(key), 1.0, terms, offsets, self.blind)

    def gradients(self, terms: Tensor, scale: float) -> Results:
        """The noise of gradients, from that of the gradient of every score; where ``relative`` changes it."""
        case = self.problem.case
        if not case.relative:
            return {}
        total = ((scale**2 * self.scores + self.bias) * terms).sum()
        gradients = torch.autograd.grad(total, list(self.factors.values()), materialize_grads=True)
        found = dict(zip(self.factors, gradients, strict=True))
        squares = {
            "query": found["content"] + found["position"],
            "key": found["keys"].unflatten(1, (case.kv_heads, case.group)).sum(2),
            "relative_content_bias": found["content"].sum((0, 2)),
            "relative_position_bias": found["position"].sum((0, 2)),
            **{name: square for name, square in found.items() if name.startswith("relative")},
        }
        wanted = [name for name in self.problem.inputs if name in squares]
        return {f"grad {name}": squares[name].sqrt() for name in wanted}


def _noise(problem: Problem, exact: Results, mask: Tensor, rows: Tensor, with_lse: bool) -> Results:
    """How far one rounding of every term moves each result: root of the sum of the squares, float64.

    Where terms cancel (a row that sees one key has gradient 0, as the difference of two products) no arithmetic comes
    closer to 0 than the rounding of its terms. Operands and results are rounded in the dtype of the case; scores and
    lse in float32, and their difference is an exponent, so its absolute error is the softmax's relative one.
    """
    case = problem.case
    inputs = {name: tensor.double() for name, tensor in problem.inputs.items()}
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    if case.apart:
        key = torch.cat([inputs["cache_key"], key], dim=2)
        value = torch.cat([inputs["cache_value"], value], dim=2)
    key, value = key.repeat_interleave(case.group, dim=1), value.repeat_interleave(case.group, dim=1)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    unit, unit32 = torch.finfo(case.dtype).eps / 2, torch.finfo(F32).eps / 2
    offsets = reference._offsets(case.layout, rows) if case.relative else None
    tables = problem.relative(inputs).terms(case.layout, query) if case.relative else None
    blind = ~mask.any(dim=-1, keepdim=True)
    scores = reference._scores(query, key, scale, tables, offsets, blind).masked_fill(~mask, float("-inf"))
    squares = _Squares(problem, inputs, key, offsets, blind)
    softmax = scores.softmax(dim=-1).nan_to_num(0.0)
    kept = torch.ones_like(softmax)
    if case.dropout_p:
        keep = dropout_keep(
            problem.options["seed"], case.batch, query.shape[1], rows, case.layout.num_keys, case.dropout_p
        )
        kept = keep.double() / (1 - case.dropout_p)
    grad_out = torch.zeros_like(query) if problem.grad_out is None else problem.grad_out.double()
    grad_lse = torch.zeros_like(query[..., 0])
    if with_lse and problem.grad_lse is not None:
        grad_lse = problem.grad_lse.double()

    # A sum of head_dim products, rounded after each addition.
    summing = unit32**2 * case.head_dim / 6
    added = unit**2 if "_bias" in "".join(inputs) else 0.0  # a bias and the query are rounded together
    score = (unit32**2 + summing + added) * (scale**2 * squares.scores.detach()).masked_fill(~mask, 0.0)
    lse = unit32**2 * (1 + exact["lse"].masked_fill(exact["lse"].isinf(), 0.0) ** 2) + (softmax * score).sum(-1)
    relative = unit**2 + unit32**2 * scores.masked_fill(~mask, 0.0) ** 2 + score + lse[..., None]
    weights = (softmax * kept) ** 2 * relative
    delta = (unit**2 + summing) * (grad_out * exact["out"]).pow(2).sum(-1) + unit32**2 * grad_lse**2
    slope = kept * (grad_out @ value.mT) - ((grad_out * exact["out"]).sum(-1) - grad_lse)[..., None]
    terms = (unit**2 + summing) * kept**2 * (grad_out**2 @ (value**2).mT) + delta[..., None] + slope**2 * relative
    terms = softmax**2 * terms

    def summed(squares: Tensor) -> Tensor:
        batch, _, rows, width = squares.shape
        return squares.reshape(batch, case.kv_heads, case.group, rows, width).sum(2).sqrt()

    noise = {
        "out": (weights @ value**2).sqrt(),
        "lse": lse.sqrt(),
        "grad query": abs(scale) * (terms @ key**2).sqrt(),
        "grad key": abs(scale) * summed(terms.mT @ query**2),
        "grad value": summed(weights.mT @ grad_out**2),
    }
    noise |= squares.gradients(terms, scale)
    if case.apart:
        size = case.layout.key_size("cache")
        for name in ("key", "value"):
            whole = noise[f"grad {name}"]
            noise[f"grad cache_{name}"], noise[f"grad {name}"] = whole[:, :, :size], whole[:, :, size:]
    return noise


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def complaints(case: Case, found: Results, want: Expected, factor: float = 2.0) -> list[str]:
    """Every way in which ``found`` breaks the rule; empty where it keeps it."""
    said = []
    blind = want.blind[:, None].expand(want.exact["out"].shape[:3])
    for name, exact in want.exact.items():
        got = found[name]
        dtype = F32 if name == "lse" else case.dtype
        if got.shape != exact.shape or got.dtype != dtype:
            said.append(f"{name}: shape {tuple(got.shape)} {got.dtype}, expected {tuple(exact.shape)} {dtype}")
            continue
        got = got.double().cpu()
        if name == "lse":
            if not torch.equal(got == float("-inf"), blind):
                said.append("lse: -inf must stand where a row sees nothing, and nowhere else")
                continue
            got, exact = got[~blind], exact[~blind]
        if not got.isfinite().all():
            said.append(f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} values are not finite")
            continue
        if name in ("out", "grad query") and got[blind].any():
            said.append(f"{name}: must be 0 where a row sees nothing")
        if name not in ("out", "lse", "grad query") and "relative" not in name:
            size = 0 if not case.apart else case.layout.key_size("cache")
            unseen = want.unseen[:, :size] if "cache" in name else want.unseen[:, size:]
            if got[unseen[:, None].expand(got.shape[:3])].any():
                said.append(f"{name}: must be 0 where no row sees the key")

        def pick(results: Results, name: str = name) -> Tensor:
            return results[name][~blind] if name == "lse" else results[name]

        noise, error = pick(want.noise), got - exact
        unit = torch.finfo(dtype).eps / 2
        stock, single = _largest(pick(want.stock).double() - exact), _norm(pick(want.single).double() - exact)
        rounding = max(unit * _largest(exact), _largest(noise))
        # Where results cancel to nothing stock may be exact by luck. Of n normal errors the largest is expected at
        # sqrt(2 log n) standard deviations.
        spread = max(3.0, math.sqrt(2 * math.log(max(error.numel(), 1))))
        allowed = max(factor * stock + rounding, spread * rounding)
        if stock == stock and _largest(error) > allowed:
            at = tuple(int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape))
            said.append(f"{name}: largest error {_largest(error):.3g} > {allowed:.3g} (stock {stock:.3g}), at {at}")
        tolerance = RMS_TOLERANCE[dtype] * (2 if name.startswith("grad") else 1)
        # Scores so large that float32 itself cannot hold the tolerance: then no worse than twice its own error.
        bound = max(tolerance * _norm(exact), 2 * single, 2 * _norm(noise))
        if _norm(error) > bound:
            said.append(f"{name}: norm of the error {_norm(error):.3g} > {bound:.3g} (result {_norm(exact):.3g})")
    return said


def check(case: Case, found: Results, with_lse: bool = True, factor: float = 2.0) -> None:
    """Raise AssertionError where ``found`` breaks the rule."""
    said = complaints(case, found, expected(case, with_lse), factor)
    assert not said, f"{case.label}\n{case!r}\n" + "\n".join(said)
