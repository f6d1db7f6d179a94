"""What a kernel takes of a GPU that need not be there: compile for an architecture, read registers, memory and code."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypedDict

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction, create_function_from_signature

__all__ = ["CHIPS", "Resources", "Specialization", "Variant", "compile_variant", "resources", "specialize"]


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration: what ``triton.compile`` needs, and what must come out of it.

    ``signature``, ``constexprs`` and ``attrs`` are as ``ASTSource`` takes them; ``specialize`` makes them from the
    arguments of a launch. ``programs`` is how many of them one SM must hold at once, ``spills``
    how many bytes of registers may be stored and loaded again. ``tensor_cores`` is True where the
    architecture's own instructions must appear (sm_80 ``mma``, sm_90 ``wgmma``, sm_100 ``tcgen05`` or ``mma``),
    ``"mma"`` where the older ``mma`` will do (tiles too small for ``wgmma``), False where none may appear.
    ``warp_specialized`` promises warps beyond ``num_warps`` for the loads: Triton ignores the wish where it cannot.
    """

    kernel: str
    fn: Any
    signature: dict[str, Any]
    constexprs: dict[Any, object]
    num_warps: int
    num_stages: int
    dtype: str
    head_dim: int
    label: str
    attrs: dict[tuple[int, ...], list[list[object]]] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    programs: int = 1
    spills: int = 0
    tensor_cores: bool | str = True
    warp_specialized: bool = False


@dataclass(frozen=True)
class Chip:
    """Limits of one architecture: bytes of shared memory, and what its tensor-core instructions are called in SASS."""

    shared_per_program: int
    shared_per_sm: int
    tensor_ops: tuple[str, ...]


_TENSOR_OPS = ("HMMA", "HGMMA", "UTC*MMA")


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
CHIPS = {
    80: Chip(163 << 10, 164 << 10, ("HMMA",)),
    90: Chip(227 << 10, 228 << 10, ("HGMMA",)),
    100: Chip(227 << 10, 228 << 10, ("UTC*MMA", "HMMA")),
}
_REGISTERS_PER_SM = 65_536
REGISTERS_PER_THREAD = 255
_WARPS_PER_SM = 64
_PROGRAMS_PER_SM = 32
_TENSOR_COLUMNS_PER_SM = 512
_SHARED_RESERVED = 1 << 10  # per program, by the driver
_SUB_PARTITIONS = 4


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    ``registers`` is per thread; ``stack``, ``spilled`` (stored and loaded), ``shared``, ``scratch`` (global) and
    ``code`` are bytes; ``local_ops`` counts instructions on local memory, ``tensor_ops`` each tensor-core instruction;
    ``tensor_columns`` are of tensor memory; ``remark`` is ptxas's where it gave up the ``wgmma`` pipeline;
    ``seconds`` is the time of compiling.
    """

    registers: int
    warps: int
    stack: int
    spilled: int
    local_ops: int
    shared: int
    scratch: int
    tensor_columns: int
    tensor_ops: dict[str, int]
    code: int
    remark: str
    seconds: float

    @property
    def programs_by_registers(self) -> int:
        """Programs that the registers of one SM hold: they are given out by warp, in units of 256, a quarter each."""
        per_warp = -(-self.registers * 32 // 256) * 256
        rounded_warps = -(-self.warps // _SUB_PARTITIONS) * _SUB_PARTITIONS
        if self.registers > REGISTERS_PER_THREAD or per_warp * rounded_warps > _REGISTERS_PER_SM:
            return 0
        return _REGISTERS_PER_SM // _SUB_PARTITIONS // per_warp * _SUB_PARTITIONS // self.warps

    def programs_by_shared(self, arch: int) -> int:
        """Programs that the shared memory of one SM holds, and on sm_100 its tensor memory."""
        if self.shared > CHIPS[arch].shared_per_program:
            return 0
        taken = -(-(self.shared + _SHARED_RESERVED) // 128) * 128
        programs = CHIPS[arch].shared_per_sm // taken
        return min(programs, _TENSOR_COLUMNS_PER_SM // self.tensor_columns) if self.tensor_columns else programs

    def programs(self, arch: int) -> int:
        """Programs that one SM holds at once."""
        return min(
            self.programs_by_registers, self.programs_by_shared(arch), _WARPS_PER_SM // self.warps, _PROGRAMS_PER_SM
        )


class Specialization(TypedDict):
    """The part of a Variant that follows from the arguments of a launch."""

    signature: dict[str, Any]
    constexprs: dict[Any, object]
    attrs: dict[tuple[int, ...], list[list[object]]]


def specialize(fn: Any, arch: int, *args: object, **kwargs: object) -> Specialization:
    """What ``fn[grid](*args, **kwargs)`` would compile on ``arch``: types, values known, divisibility.

    Tensors may be on any device, "meta" too, where their addresses count as aligned.
    """
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bound, specialization, options = create_function_from_signature(fn.signature, fn.params, backend)(*args, **kwargs)
    _, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, options)
    return Specialization(signature=signature, constexprs=constexprs, attrs=attrs)


def compile_variant(variant: Variant, arch: int, *, afresh: bool = False) -> tuple[Any, str]:
    """The compiled kernel and ptxas's log, which is empty where Triton's cache had the kernel and not ``afresh``.

    Raises TypeError for a ``fn`` that is no compiled function, ValueError for a signature or an option that does not
    fit (Triton ignores options that it does not know), and what Triton raises.
    """
    if not isinstance(variant.fn, JITFunction):
        raise TypeError(f"fn is a {type(variant.fn).__name__}, expected a triton JITFunction")
    if list(variant.signature) != list(variant.fn.arg_names):
        raise ValueError(f"signature names {list(variant.signature)}, the kernel {list(variant.fn.arg_names)}")
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    if unknown := options.keys() - vars(make_backend(target).parse_options(dict(options))).keys():
        raise ValueError(f"options {sorted(unknown)} are unknown to triton {triton.__version__}")
    source = ASTSource(variant.fn, dict(variant.signature), dict(variant.constexprs), dict(variant.attrs))
    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = afresh
        kernel = triton.compile(source, target=target, options=options)
    return kernel, log.getvalue()


def resources(variant: Variant, arch: int) -> Resources:
    """Compile, or take from Triton's cache, and measure; what was measured is kept in that cache too."""
    started = time.perf_counter()
    kernel, log = compile_variant(variant, arch)
    kept = get_cache_manager(hashlib.sha256(f"{kernel.hash} {_own_hash()}".encode()).hexdigest())
    if not log:
        if path := kept.get_file("resources.json"):
            return Resources(**json.loads(Path(path).read_text()))
        started = time.perf_counter()
        kernel, log = compile_variant(variant, arch, afresh=True)
    result = _measured(kernel, log, time.perf_counter() - started)
    kept.put(json.dumps(asdict(result)), "resources.json", binary=False)
    return result


@functools.cache
def _own_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _measured(kernel: Any, log: str, seconds: float) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
        code = _output(knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", cubin.name)
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    instructions = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", code, re.MULTILINE)
    if used.keys() != {"REG", "STACK", "LOCAL"} or not spills or not instructions:
        raise RuntimeError(f"cannot read what cuobjdump, ptxas or nvdisasm wrote:\n{usage}\n{log}\n{code[:500]}")
    counts = Counter(name for _, name in instructions)
    remark = re.search(r"\(C75\d\d\).*", log)
    return Resources(
        registers=used["REG"],
        warps=kernel.metadata.num_warps,
        stack=used["STACK"] + used["LOCAL"],
        spilled=sum(map(int, spills)),
        local_ops=counts["LDL"] + counts["STL"],
        shared=kernel.metadata.shared,
        scratch=kernel.metadata.global_scratch_size,
        tensor_columns=kernel.metadata.tmem_size or 0,
        tensor_ops={name: n for name, n in sorted(counts.items()) if matches(name, _TENSOR_OPS)},
        code=int(instructions[-1][0], 16) + 16,
        remark=remark.group() if remark else "",
        seconds=seconds,
    )


def matches(instruction: str, patterns: tuple[str, ...]) -> bool:
    """Whether the instruction is one of those that the patterns, with ``*`` as in file names, name."""
    return any(fnmatchcase(instruction, pattern) for pattern in patterns)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
