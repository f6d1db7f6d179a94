"""Checks of arguments that several modules share."""

from __future__ import annotations

from typing import Any

__all__ = ["at_least"]


def at_least(name: str, value: Any, least: int) -> None:
    """Raise TypeError where an argument is no int, ValueError where it is less than ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
