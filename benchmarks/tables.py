"""Result records as tables: the same tables go to the terminal, to Markdown and to HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Table",
    "environment_lines",
    "error_table",
    "headline",
    "language_model",
    "limits",
    "published",
    "summary_lines",
]

Record = dict[str, Any]
Results = dict[str, Any]

_COLUMNS = (
    ("bfloat16", "forward"), ("bfloat16", "forward+backward"), ("float32", "forward"), ("float32", "forward+backward"),
)  # fmt: skip
# Times ours must be faster than each opponent on the target, for each of _COLUMNS.
TARGETS = {
    "dense": (2.4, 4.0, 1.8, 2.0),
    "split": (1.6, 2.5, 1.15, 1.5),
    "plain": (1.3, 2.0, 1.0, 1.2),
    "naive": (10.0, 5.0, 5.0, 4.0),
}
_NAMES = {
    "dense": "SDPA with the dense mask",
    "split": "three-call split",
    "plain": "plain causal SDPA *",
    "naive": "naive PyTorch",
    "flex": "FlexAttention",
}
MOST_MEMORY, MOST_OVERHEAD = 0.05, 30e-6


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of text, and a note below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def terminal(self) -> str:
        """Aligned columns."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]

        def aligned(line: Sequence[str]) -> str:
            cells = [
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        body = [self.title, rule, aligned(self.header), rule, *(aligned(row) for row in self.rows)]
        return "\n".join([*body, *([self.note] if self.note else [])])

    def markdown(self, level: int = 2) -> str:
        """A GitHub table under a heading; level 0 leaves the heading out."""

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [f"{'#' * level} {self.title}", ""] if level else []
        lines += [line(self.header), line(rule), *(line(row) for row in self.rows)]
        return "\n".join([*lines, *(["", self.note.replace("*", "\\*")] if self.note else [])])

    def html(self) -> str:
        """A heading and a table; cells that name a failure are marked."""

        def cell(tag: str, text: str) -> str:
            bad = any(word in text for word in ("WRONG", "missed", "slower", "failed"))
            kind = ' class="bad"' if bad else ' class="good"' if "reached" in text else ""
            return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

        head = "".join(cell("th", text) for text in self.header)
        rows = "\n".join("<tr>" + "".join(cell("td", text) for text in row) + "</tr>" for row in self.rows)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f"<h2>{html.escape(self.title)}</h2>\n<table><tr>{head}</tr>\n{rows}</table>\n{note}"


def _ms(record: Record | None) -> str:
    if record is None:
        return "-"
    if record["seconds"] is None:
        return record["note"].split(":")[0] if record["match"] is False else f"- ({record['note']})"
    seconds = record["seconds"]
    half = (seconds["q3"] - seconds["q1"]) / 2
    return f"{seconds['median'] * 1e3:.2f} ± {half * 1e3:.2f}"


def median(record: Record | None) -> float | None:
    """Seconds, where the record has a time."""
    return None if record is None or record["seconds"] is None else float(record["seconds"]["median"])


def _find(records: Iterable[Record], **wanted: str) -> Record | None:
    return next((r for r in records if all(r[key] == value for key, value in wanted.items())), None)


def _ratio(theirs: Record | None, ours: Record | None) -> float | None:
    a, b = median(theirs), median(ours)
    return None if a is None or b is None else a / b


def headline(results: Results) -> Table:
    """Times faster than each opponent on the target, beside what it must reach."""
    records = results.get("target", [])
    rows = []
    for name, targets in TARGETS.items():
        row = [_NAMES[name]]
        for (dtype, mode), target in zip(_COLUMNS, targets, strict=True):
            ratio = _ratio(
                _find(records, contestant=name, dtype=dtype, mode=mode),
                _find(records, contestant="ours", dtype=dtype, mode=mode),
            )
            verdict = "" if ratio is None else "reached" if ratio >= target else "missed"
            row.append("-" if ratio is None else f"{ratio:.2f}x (≥ {target:g}x {verdict})")
        rows.append(row)
    rows.append([_NAMES["flex"] + ", compiled"])
    for dtype, mode in _COLUMNS:
        flex = _find(results.get("flex", []), contestant="flex", dtype=dtype)
        ratio = _ratio(flex, _find(results.get("flex", []), contestant="ours", dtype=dtype))
        if mode != "forward":
            rows[-1].append("no backward on the CPU")
        elif ratio is not None:
            rows[-1].append(f"{ratio:.2f}x")
        else:
            rows[-1].append("in the full run" if flex is None else flex["note"])
    noise = ["noise: ours against itself"]
    times = ["ours, ms"]
    for dtype, mode in _COLUMNS:
        ours = _find(records, contestant="ours", dtype=dtype, mode=mode)
        again = _ratio(_find(records, contestant="again", dtype=dtype, mode=mode), ours)
        noise.append("-" if again is None else f"{again:.2f}x")
        times.append(_ms(ours))
    rows += [noise, times]
    return Table(
        "Times faster than stock PyTorch: rmt_decoder, 1024 tokens + 2 x 16 memory, batch 1, 12 heads x 64",
        ["against", "bf16 forward", "bf16 fwd+bwd", "fp32 forward", "fp32 fwd+bwd"],
        rows,
        "Medians of contestants that take turns in one process; ± is half the distance between the quartiles. "
        "* computes something else, attention without memory rules: the ceiling.",
    )


def limits(results: Results) -> Table:
    """What a call costs and how much memory a long one takes, beside what they may."""
    rows = []
    tiny = results.get("overhead", [])
    ours, plain = median(_find(tiny, contestant="ours")), median(_find(tiny, contestant="plain"))
    if ours is not None and plain is not None:
        extra = ours - plain
        rows.append([
            "a forward call on tiny inputs, more than SDPA's", f"{extra * 1e6:.0f} µs", f"{MOST_OVERHEAD * 1e6:.0f} µs",
            "reached" if extra <= MOST_OVERHEAD else "missed",
        ])  # fmt: skip
    for record in results.get("long", []):
        if record["contestant"] == "ours" and record["peak_bytes"] is not None:
            share = record["peak_bytes"] / record["score_bytes"]
            rows.append([
                "memory of forward + backward at T = 16,384, as a share of the dense scores", f"{share:.1%}",
                f"{MOST_MEMORY:.0%}", "reached" if share < MOST_MEMORY else "missed",
            ])  # fmt: skip
    return Table("Limits", ["what", "measured", "at most", ""], rows)


def _best(records: Sequence[Record]) -> Record | None:
    able = [r for r in records if r["contestant"] not in ("ours", "again") and r["same"] and median(r) is not None]
    return min(able, key=lambda record: record["seconds"]["median"], default=None)


def pairs(results: Results) -> list[tuple[Record, Record | None]]:
    """Ours and the best stock composition on each published case, dtype and mode."""
    found = []
    for ours in results.get("published", []):
        if ours["contestant"] == "ours":
            keys = ("case", "dtype", "mode")
            others = [r for r in results["published"] if all(r[key] == ours[key] for key in keys)]
            found.append((ours, _best(others)))
    return found


def _mib(record: Record | None) -> str:
    return "-" if record is None or record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:.1f}"


def published(results: Results) -> Table:
    """Ours against the best stock composition on every published case."""
    rows, slower, counted = [], 0, 0
    for ours, best in pairs(results):
        ratio = _ratio(best, ours)
        counted += ratio is not None
        slower += ratio is not None and ratio < 1.0
        verdict = "-" if ratio is None else f"{ratio:.2f}x" + (" slower" if ratio < 1.0 else "")
        rows.append([
            ours["case"], ours["dtype"], ours["mode"], _ms(ours), _ms(best), best["label"] if best else "-", verdict,
            "-" if ours["tflops"] is None else f"{ours['tflops']:.3f}", _mib(ours), _mib(best),
        ])  # fmt: skip
    return Table(
        "Published cases: ours against the fastest stock composition that computes the same",
        ["case", "dtype", "mode", "ours, ms", "stock, ms", "by", "faster", "TFLOP/s", "ours, MiB", "stock, MiB"],
        rows,
        f"Slower on {slower} of {counted}. FlexAttention is not among them. TFLOP/s count visible entries only; "
        "MiB is the peak PyTorch allocated "
        "during the call, results included, masks built beforehand not.",
    )


def error_table(results: Results) -> Table:
    """Largest errors against float64 on the target, and what eager PyTorch in the same dtype is off by."""
    rows = []
    for record in results.get("target", []):
        if record["contestant"] == "again":
            continue
        for name, error in record["errors"].items():
            rows.append([
                record["dtype"], record["mode"], record["label"], name, f"{error['max']:.2e}",
                f"{error['eager_max']:.2e}", f"{error['rms']:.2e}", "yes" if record["match"] else "WRONG",
            ])  # fmt: skip
    return Table(
        "Errors against float64 on the target",
        ["dtype", "mode", "contestant", "result", "largest", "eager PyTorch's", "RMS ratio", "match"],
        rows,
    )


def language_model(results: Results) -> Table | None:
    """The language model trained with naive attention and with ours."""
    model = results.get("language_model")
    if not model:
        return None
    rows = [
        [label, f"{model[name]['losses'][-1]:.4f}", f"{model[name]['tokens_per_second']:,.0f}"]
        for name, label in (("naive", "naive attention"), ("ours", "rmt_kernels"))
    ]
    gain = model["ours"]["tokens_per_second"] / model["naive"]["tokens_per_second"]
    return Table(
        f"A byte-level RMT language model on real text, {model['steps']} steps",
        ["trained with", "last loss", "tokens/s"],
        rows,
        f"{gain:.2f} times the tokens per second; the losses differ by at most {model['max_loss_difference']:.2e}.",
    )


def summary_lines(results: Results) -> list[str]:
    """Where, with what and when; and what was left out or went wrong."""
    lines = [*environment_lines(results["environment"]), f"{results['environment']['command']} ({results['plan']} run)"]
    if results["left_out"]:
        lines.append(
            f"left out, no time left in this {results['plan']} run: {len(results['left_out'])} experiments "
            f"({results['left_out'][0]} … {results['left_out'][-1]}); python -m benchmarks --full has more time"
        )
    return lines + [f"FAILED {line}" for line in failures(results)]


def environment_lines(here: dict[str, Any]) -> list[str]:
    """Where, with what and when."""
    device, versions = here["device"], here["versions"]
    return [
        f"{device['cpu']}, {device['cores']} cores, {device['threads']} threads, kernels for {device['kernel_isa']} "
        f"({', '.join(device['vector_units'])})",
        f"rmt_kernels {versions['rmt_kernels']}, torch {versions['torch']}, Python {versions['python']}, "
        f"commit {here['commit'][:12]}{'-dirty' if here['commit'].endswith('-dirty') else ''}, {here['date']}",
    ]


def failures(results: Results) -> list[str]:
    """Every contestant that gave a wrong result or failed, in words."""
    return [
        f"{r['label']} on {r['case']} {r['dtype']} {r['mode']}: {r['note']}"
        for section in ("target", "lengths", "published", "flex", "long")
        for r in results.get(section, [])
        if r["note"].startswith(("WRONG", "failed"))
    ]
