"""The picture behind ``SegmentLayout.plot``. matplotlib is imported only when a picture is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rmt_kernels.layout import Region

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rmt_kernels.layout import SegmentLayout

__all__ = ["plot_layout"]

_HIDDEN = "#eef0f4"
_VISIBLE = {  # by the region of the key
    Region.CACHE: "#b07aa1",
    Region.READ: "#f28e2b",
    Region.TOKENS: "#2f6db3",
    Region.WRITE: "#3f9b5b",
}
_INK = "#333a45"


def plot_layout(layout: SegmentLayout, ax: Axes | None = None) -> Axes:
    """Draw which keys (columns) each query row sees, coloured by the key's region, and return the axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap
    except ImportError as error:
        raise ImportError("SegmentLayout.plot needs matplotlib: pip install matplotlib") from error

    keys = [(r, layout.key_offset(r), layout.key_size(r)) for r in Region if layout.key_size(r)]
    queries = []
    for region, form in zip((Region.READ, Region.TOKENS, Region.WRITE), layout.forms, strict=True):
        first = max(0, layout.query_offset(region) - layout.skip)
        last = layout.query_offset(region) + form.rows - layout.skip
        if last > first:
            queries.append((region, first, last - first))
    if ax is None:
        longest = max(layout.num_queries, layout.num_keys, 1)
        size = (1.9 + 4.6 * layout.num_keys / longest, 1.3 + 4.6 * layout.num_queries / longest)
        _, ax = plt.subplots(figsize=(max(size[0], 3.2), max(size[1], 2.2)), layout="constrained")
    title = layout.name if layout.window is None else f"{layout.name}, window {layout.window}"
    ax.set_title(title, color=_INK, fontsize=11, fontweight="bold")
    if not keys or not queries:
        ax.text(0.5, 0.5, "no rows", ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
        return ax

    colours = torch.cat([torch.full((size,), region + 1) for region, _, size in keys])
    picture = torch.where(layout.dense_mask(), colours, 0)
    palette = ListedColormap([_HIDDEN, *(_VISIBLE[region] for region in Region)])
    ax.imshow(picture.numpy(), cmap=palette, vmin=0, vmax=len(Region), interpolation="nearest", aspect="equal")
    # A wide border would cover a region of few rows.
    border = 2.0 if all(size / layout.num_keys > 0.04 for _, _, size in keys) else 0.8
    for _, first, _ in keys[1:]:
        ax.axvline(first - 0.5, color="white", linewidth=border)
    for _, first, _ in queries[1:]:
        ax.axhline(first - 0.5, color="white", linewidth=border)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=9)
    ax.set_xticks([first + (size - 1) / 2 for _, first, size in keys])
    # A region of few columns leaves no room for its name in a line of names.
    crowded = any(size / layout.num_keys < 0.13 for _, _, size in keys)
    ax.set_xticklabels(
        [f"{region.name} {size}" for region, _, size in keys],
        rotation=30 if crowded else 0, ha="left" if crowded else "center", rotation_mode="anchor",
    )  # fmt: skip
    ax.set_yticks([first + (size - 1) / 2 for _, first, size in queries])
    ax.set_yticklabels([f"{region.name} {size}" for region, _, size in queries])
    for labels, regions in ((ax.get_xticklabels(), keys), (ax.get_yticklabels(), queries)):
        for label, (region, _, _) in zip(labels, regions, strict=True):
            label.set_color(_VISIBLE[region])
            label.set_fontweight("bold")
    ax.set_xlabel("keys", color=_INK)
    ax.set_ylabel("queries", color=_INK)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax
