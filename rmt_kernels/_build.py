"""What the build left behind: for which GPUs the CUDA extension was compiled, or why there is none."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["CudaBuild", "cuda", "why_no_cuda"]

_RECORD = Path(__file__).with_name("_built.json")
_HOW = "build it with: RMT_KERNELS_CUDA=1 pip install --no-build-isolation ."


@dataclass(frozen=True)
class CudaBuild:
    """The CUDA extension as it was built, or, in ``why_missing``, why there is none; the rest is empty then.

    ``architectures`` as nvcc names them (``"80"``, ``"90a"``), ``elements`` ``"BF16"`` and ``"F16"``, ``widths`` head
    sizes, ``compiler`` with its version, ``module`` the file's name.
    """

    architectures: tuple[str, ...] = ()
    elements: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    compiler: str = ""
    module: str = ""
    why_missing: str = ""

    def describe(self) -> str:
        """What was built, for what and by what, in words."""
        return (
            f"{' and '.join(self.elements)} at head_dim {', '.join(map(str, self.widths))} for "
            f"{', '.join(f'sm_{name}' for name in self.architectures)}, by {self.compiler}"
        )


def cuda() -> CudaBuild:
    """What setup.py recorded beside this file."""
    try:
        facts = json.loads(_RECORD.read_text())["cuda"]
    except FileNotFoundError:
        return CudaBuild(why_missing=f"nothing was compiled here; {_HOW}")
    if "why_missing" in facts:
        return CudaBuild(why_missing=f"{facts['why_missing']}; {_HOW}")
    build = CudaBuild(
        architectures=tuple(facts["architectures"]),
        elements=tuple(facts["elements"]),
        widths=tuple(facts["widths"]),
        compiler=facts["compiler"],
        module=facts["module"],
    )
    if build.module not in [f"_cuda{suffix}" for suffix in EXTENSION_SUFFIXES]:
        return CudaBuild(why_missing=f"there is only {build.module}, which is for another Python; {_HOW}")
    if not _RECORD.with_name(build.module).exists():
        return CudaBuild(why_missing=f"{build.module}, of which {_RECORD} tells, is not beside it; {_HOW}")
    return build


def why_no_cuda() -> str:
    """Empty where ``rmt_kernels._cuda`` is there and loads, which needs no GPU; otherwise the reason."""
    build = cuda()
    if build.why_missing:
        return f"the CUDA extension was not built: {build.why_missing}"
    try:
        importlib.import_module("rmt_kernels._cuda")
    except ImportError as error:
        return f"the CUDA extension does not load: {error}"
    return ""
