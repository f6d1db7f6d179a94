"""Distance-dependent scores: ours against the dense shift trick. ``python -m benchmarks.relative``.

The shift trick is what Transformer-XL's code does: the products of all rows with all distances, (queries x keys) for
every head, moved into place by a copy. Every contestant is checked against float64 before it is timed. Exit status 1
where one is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.environment import ROOT, environment
from benchmarks.files import RESULTS, write_json
from benchmarks.measure import RMS_TOLERANCE, interleave, peak_bytes
from benchmarks.report import replace_block, source_line
from benchmarks.tables import Table, environment_lines
from rmt_kernels import Relative, SegmentLayout, reference_attention, segment_attention

__all__ = ["CASES", "CONTESTANTS", "Case", "main", "run", "table"]

OURS, OPPONENT = "rmt_kernels", "dense shift trick"
WANTED = 2.0  # times the speed of the opponent, forward + backward, at WikiText-103's sizes
PAGE = ROOT / "docs" / "attention.md"


@dataclass(frozen=True)
class Case:
    """Sizes of one call; ``layout`` has a cache and memory."""

    name: str
    layout: SegmentLayout
    batch: int
    heads: int
    head_dim: int


_WIKITEXT = SegmentLayout.transformer_xl(150, 150, memory=10)
CASES = {
    "wikitext-103": Case("WikiText-103: 150 tokens, cache 150, memory 10, 60 x 10 x 41", _WIKITEXT, 60, 10, 41),
    "long": Case(
        "512 tokens, cache 512, memory 16, 4 x 12 x 64", SegmentLayout.transformer_xl(512, 512, memory=16), 4, 12, 64
    ),
}
_QUICK = {
    name: Case(f"{case.name.split(':')[0]}, batch 2", case.layout, 2, case.heads, case.head_dim)
    for name, case in CASES.items()
}


@dataclass
class Inputs:
    """Query, key, value as they leave a projection, (batch, rows, heads, head_dim) seen transposed; and r, u, v."""

    tensors: list[Tensor]
    grad: Tensor
    layout: SegmentLayout
    hidden: Tensor  # bool (queries, keys)

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype) -> Inputs:
        """Normal numbers."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        layout, width = case.layout, case.head_dim
        rows = (layout.num_queries, layout.num_keys, layout.num_keys)
        tensors = [normal(case.batch, n, case.heads, width).transpose(1, 2) for n in rows]
        tensors += [normal(case.heads, layout.num_keys, width), normal(case.heads, width), normal(case.heads, width)]
        grad = normal(case.batch, case.heads, layout.num_queries, width)
        return cls([t.requires_grad_() for t in tensors], grad, layout, ~layout.dense_mask())


def _shifted(query: Tensor, table: Tensor) -> Tensor:
    """(batch, heads, queries, keys): products with the distances, then the shift."""
    products = query @ table.flip(1).mT
    batch, heads, queries, keys = products.shape
    padded = torch.cat([products.new_zeros(batch, heads, queries, 1), products], dim=-1)
    return padded.view(batch, heads, keys + 1, queries)[:, :, 1:].reshape(batch, heads, queries, keys)


def _dense(inputs: Inputs) -> Tensor:
    query, key, value, r, u, v = inputs.tensors
    scores = (query + u[:, None]) @ key.mT + _shifted(query + v[:, None], r)
    probabilities = (scores * query.shape[-1] ** -0.5).masked_fill(inputs.hidden, float("-inf")).softmax(-1)
    return torch.matmul(probabilities, value)


def _sdpa(inputs: Inputs) -> Tensor:
    query, key, value, r, u, v = inputs.tensors
    bias = (_shifted(query + v[:, None], r) * query.shape[-1] ** -0.5).masked_fill(inputs.hidden, float("-inf"))
    return F.scaled_dot_product_attention(query + u[:, None], key, value, attn_mask=bias)


def _ours(inputs: Inputs) -> Tensor:
    query, key, value, r, u, v = inputs.tensors
    relative = Relative(r, u, v, mode="shifted")
    return segment_attention(query, key, value, inputs.layout, relative=relative, backend="cpu")


def _without(inputs: Inputs) -> Tensor:
    query, key, value = inputs.tensors[:3]
    return segment_attention(query, key, value, inputs.layout, backend="cpu")


_compiled = torch.compile(_dense, dynamic=False, fullgraph=True)  # which raises rather than run it as it is
CONTESTANTS: dict[str, Callable[[Inputs], Tensor]] = {
    OURS: _ours,
    OPPONENT: _dense,
    "dense shift trick, compiled": _compiled,
    "shift trick as SDPA's mask": _sdpa,
    "ours without relative *": _without,
}


def _gradients(contestant: Callable[[Inputs], Tensor], inputs: Inputs) -> list[Tensor]:
    """out, and the gradient of everything that has one."""
    out = contestant(inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs.tensors, inputs.grad, allow_unused=True)]  # type: ignore[list-item]


def _forward(contestant: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return contestant(inputs)


def _check(name: str, contestant: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[bool, float]:
    """Whether a contestant is right, on a few samples, and its largest relative error over the tolerance."""
    few = Inputs(
        [t[:2].detach().requires_grad_() if t.dim() == 4 else t for t in inputs.tensors],
        inputs.grad[:2], inputs.layout, inputs.hidden,
    )  # fmt: skip
    wide = [t.detach().double().requires_grad_() for t in few.tensors]
    query, key, value, r, u, v = wide
    relative = None if name.endswith("*") else Relative(r, u, v, mode="shifted")
    exact_out, _ = reference_attention(query, key, value, few.layout, relative=relative)
    exact = [exact_out.detach(), *torch.autograd.grad(exact_out, wide, few.grad.double(), allow_unused=True)]
    plain = _gradients(_dense, few) if not name.endswith("*") else _gradients(_without, few)
    found = _gradients(contestant, few)

    def error(got: Tensor, want: Tensor) -> float:
        return float((got.double() - want).norm() / want.norm())

    worst = 0.0
    for i, (got, want, stock) in enumerate(zip(found, exact, plain, strict=True)):
        if want is None:
            continue
        # bfloat16's own rounding of query + bias may exceed the tolerance: then no worse than the shift trick's.
        allowed = max(RMS_TOLERANCE[inputs.grad.dtype] * (2 if i else 1), 2 * error(stock, want))
        worst = max(worst, error(got, want) / allowed)
    return worst <= 1, worst


def run(
    cases: dict[str, Case],
    *,
    rounds: int,
    seconds: float,
    contestants: dict[str, Callable[[Inputs], Tensor]] = CONTESTANTS,
) -> dict[str, Any]:
    """Check, weigh and time every contestant on every case, in float32 and bfloat16."""
    here = environment()
    records: list[dict[str, Any]] = []
    work = [(key, dtype) for key in cases for dtype in (torch.float32, torch.bfloat16)]
    for key, dtype in tqdm(work, desc="relative", unit="case"):
        torch.compiler.reset()  # a function is compiled 8 times at most
        inputs = Inputs.of(cases[key], dtype)
        steps: dict[tuple[str, bool], Callable[[], object]] = {}
        for name, contestant in contestants.items():
            right, worst = _check(name, contestant, inputs)
            entry = {"case": key, "what": cases[key].name, "dtype": str(dtype).split(".")[1], "contestant": name}
            entry |= {"right": right, "error_over_allowed": worst}
            records.append(entry)
            if right:
                entry["peak_bytes"] = peak_bytes(partial(_gradients, contestant, inputs))
                steps[name, True] = partial(_gradients, contestant, inputs)
                steps[name, False] = partial(_forward, contestant, inputs)
        for backward in (False, True):
            chosen = {name: step for (name, both), step in steps.items() if both is backward}
            times = interleave(chosen, rounds=rounds, warmup=0.2, budget=seconds)
            for name, spent in times.items():
                entry = next(r for r in records[-len(contestants) :] if r["contestant"] == name)
                low, _, high = quantiles(spent, n=4)
                entry["forward_backward" if backward else "forward"] = {
                    "median": median(spent), "half_quartiles": (high - low) / 2, "rounds": len(spent),
                }  # fmt: skip
    return {"environment": here, "records": records}


def _cell(entry: dict[str, Any], what: str) -> str:
    if not entry["right"]:
        return "WRONG"
    return f"{1e3 * entry[what]['median']:.1f} ± {1e3 * entry[what]['half_quartiles']:.1f}"


def table(results: dict[str, Any]) -> Table:
    """Times, ratios and memory of every contestant."""
    rows = []
    for entry in results["records"]:
        ours = next(
            r for r in results["records"]
            if r["contestant"] == OURS and (r["case"], r["dtype"]) == (entry["case"], entry["dtype"])
        )  # fmt: skip
        ratio = ""
        if entry["right"] and ours["right"] and entry is not ours:
            times = entry["forward_backward"]["median"] / ours["forward_backward"]["median"]
            ratio = f"{times:.2f}x"
            if entry["contestant"] == OPPONENT and entry["case"] == "wikitext-103":
                ratio += f" (≥ {WANTED:g}x {'reached' if times >= WANTED else 'missed'})"
        memory = f"{entry['peak_bytes'] / 2**20:.0f}" if entry["right"] else ""
        rows.append(
            [f"{entry['what']}, {entry['dtype']}", entry["contestant"], _cell(entry, "forward"),
             _cell(entry, "forward_backward"), ratio, memory]
        )  # fmt: skip
    return Table(
        "Transformer-XL's relative scores",
        ("sizes", "contestant", "forward, ms", "forward + backward, ms", "time over ours", "peak, MiB"),
        rows,
        "* computes something else, attention without relative scores: what they cost. Medians of contestants that "
        "take turns; ± is half the distance between the quartiles.",
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relative", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two samples, few rounds: under a minute")
    parser.add_argument("--save", metavar="NAME", help="keep the result under benchmarks/results and update the page")
    parser.add_argument("--out", type=Path, help="write the result, as JSON, to this file")
    options = parser.parse_args(arguments)
    results = run(
        _QUICK if options.quick else CASES, rounds=5 if options.quick else 30, seconds=2.0 if options.quick else 40.0
    )
    print("\n".join(environment_lines(results["environment"])), "", table(results).terminal(), sep="\n")
    if options.save:
        options.out = RESULTS / f"{options.save}.json"
    if options.out:
        write_json(options.out, results)
    if options.save:
        what = "<br>".join([*environment_lines(results["environment"]), "python -m benchmarks.relative"])
        source = f"<sub>{what}<br>{source_line(options.out)}</sub>"
        replace_block(PAGE, "relative", ["", table(results).markdown(level=0), "", source])
    return 0 if all(entry["right"] for entry in results["records"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
