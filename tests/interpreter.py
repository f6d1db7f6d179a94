"""Triton's interpreter, as the tests use it where there is no GPU."""

from __future__ import annotations

import importlib.util
import inspect
import os
from typing import Any

__all__ = ["INTERPRETED", "hasten"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def hasten() -> None:
    """Twice the speed: look up once, not at every call of a jit function, what the interpreter replaces."""
    if not INTERPRETED or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    module: Any = interpreter
    names: dict[int, list[str]] = {}

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        builtin = module.tl.core.is_builtin
        if id(package) not in names:
            names[id(package)] = [name for name, member in inspect.getmembers(package) if builtin(member)]
        for name in names[id(package)]:
            member = getattr(package, name)
            if builtin(member):
                module._patch_attr(package, name, member, builder, *scope)

    if hasattr(module, "_patch_builtin"):
        module._patch_builtin = patch_builtin
