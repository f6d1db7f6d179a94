"""The stage "huggingface" of ``python -m benchmarks.gpu``: the same measurements, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu.stage import Context, Item, Payload
from benchmarks.huggingface.limits import failures

__all__ = ["collect", "huggingface_items"]

_PARTS = {"train": 200.0, "prefill": 170.0, "generate": 110.0}  # the most seconds each may take


def _item(model: str, part: str) -> Callable[[Context], Payload]:
    def run(context: Context) -> Payload:
        if find_spec("transformers") is None:
            return {"records": [], "facts": {"left out": "transformers is not installed"}}
        from benchmarks.huggingface import runs
        from benchmarks.huggingface.models import SHAPES

        device = context.gpu()
        plan = runs.CUDA if device.torch.type == "cuda" else runs.QUICK
        most = max(1.0, context.left() / 3)
        plan = replace(plan, budget=min(plan.budget, most), read_budget=min(plan.read_budget, most))
        bench = runs.Bench(SHAPES[model], plan, device.torch)
        records = bench.run(part)
        for record in records:
            rate, note = record["tokens_per_second"], record["note"]
            context.say(f"    {record['label']}: " + (f"{rate:,.0f} tokens/s" if rate else note or "weighed only"))
        results = runs.about(plan, device.torch) | {"models": {model: bench.described()}, "records": records}
        device.release()
        facts = {name: value for name, value in results.items() if name != "records"}
        return {"records": records, "facts": facts, "failures": failures(results)}

    return run


def huggingface_items(models: Sequence[str]) -> list[Item]:
    """Each part of each model, by their names in ``models.SHAPES``."""
    return [
        Item(f"{model}, {part}", _item(model, part), limit=limit, least=30.0)
        for model in models
        for part, limit in _PARTS.items()
    ]


def collect(results: dict[str, Any]) -> dict[str, Any]:
    """A GPU run's stage in the form of ``runs.run``; without models where it has not run."""
    found: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "transformers": "?", "models": {}, "records": []}
    for item in results.get("stages", {}).get("huggingface", {}).get("items", {}).values():
        facts = item.get("facts") or {}
        if "models" in facts:
            found["models"] |= facts["models"]
            found |= {name: value for name, value in facts.items() if name != "models"}
            found["records"] += item.get("records", [])
    return found
