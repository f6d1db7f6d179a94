"""Places for names beside the ends of lines."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["push_apart"]


def push_apart(places: Iterable[float], apart: float, least: float, most: float = float("inf")) -> list[float]:
    """Growing places moved until neighbours are ``apart``, within ``least`` and ``most`` as far as they can be."""
    found = sorted(places)
    for _ in range(300):  # neighbours push each other by halves, so a cluster stays centred on its lines
        for i in range(len(found) - 1):
            overlap = apart - (found[i + 1] - found[i])
            if overlap > 0:
                found[i], found[i + 1] = found[i] - overlap / 2, found[i + 1] + overlap / 2
        found = [min(max(place, least), most) for place in found]
    return found
