"""Draws docs/pictures: every preset with ``SegmentLayout.plot``, a picture a family.

Run ``python docs/make_pictures.py`` after a change of a layout or of its drawing. Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rmt_kernels import Rule, SegmentLayout

PICTURES = Path(__file__).resolve().parent / "pictures"

# Small sizes: what counts is who sees whom, and a region of few rows must stay wide enough for its name.
FAMILIES: dict[str, list[list[tuple[str, SegmentLayout]]]] = {
    "decoders": [
        [
            ("rmt_decoder: the paper's mask", SegmentLayout.rmt_decoder(16, 5)),
            ("causal: the Hugging Face wrapper's", SegmentLayout.causal(16, 5)),
        ]
    ],
    "caches": [
        [
            ("transformer_xl", SegmentLayout.transformer_xl(16, 12)),
            ("transformer_xl, window=cache (same length)", SegmentLayout.transformer_xl(16, 12, window=12)),
        ],
        [
            ("transformer_xl, memory=5", SegmentLayout.transformer_xl(16, 12, memory=5)),
            (
                "transformer_xl, memory=5, read_cache=True",
                SegmentLayout.transformer_xl(16, 12, memory=5, read_cache=True),
            ),
        ],
        [
            ("rmt_decoder, cache=12, window=8", SegmentLayout.rmt_decoder(16, 5, cache=12, window=8)),
            ("causal, cache=12", SegmentLayout.causal(16, 5, cache=12)),
        ],
    ],
    "encoders": [
        [
            ("rmt_encoder, memory_transformer", SegmentLayout.rmt_encoder(16, 6)),
            ("membart", SegmentLayout.membart(16, 6)),
        ]
    ],
    "cross": [
        [
            ("bottleneck write", SegmentLayout.memory_bottleneck(16, 7, step="write")),
            ("memformer_write", SegmentLayout.memformer_write(16, 7)),
            ("memformer_read and\nbottleneck read", SegmentLayout.memformer_read(16, 7)),
        ]
    ],
    "derived": [
        [
            ("rmt_decoder(16, 5).last(8)", SegmentLayout.rmt_decoder(16, 5).last(8)),
            ("rmt_decoder(16, 5).decoding(3)", SegmentLayout.rmt_decoder(16, 5).decoding(3)),
            (
                "a layout of your own (ARMT)",
                SegmentLayout(
                    tokens=16,
                    write=5,
                    rules={
                        ("tokens", "tokens"): Rule.CAUSAL,
                        ("write", "tokens"): Rule.FULL,
                        ("write", "write"): Rule.CAUSAL,
                    },
                ),
            ),
        ]
    ],
}


def draw(name: str, family: list[list[tuple[str, SegmentLayout]]]) -> Path:
    """Write one picture and return where it is. Cells are about as large in all of them."""
    cell, columns = 0.115, len(family[0])
    widths = [max(max(row[i][1].num_keys for row in family) * cell + 1.45, 2.6) for i in range(columns)]
    heights = [max(layout.num_queries for _, layout in row) * cell + 1.05 for row in family]
    figure, axes = plt.subplots(
        len(family), columns, figsize=(sum(widths), sum(heights)), squeeze=False,
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
        gridspec_kw={"width_ratios": widths, "height_ratios": heights},
    )  # fmt: skip
    for row, drawn in zip(axes, family, strict=True):
        for ax, (title, layout) in zip(row, drawn, strict=True):
            layout.plot(ax)
            ax.set_anchor("N")
            ax.set_title(title, fontsize=10, fontweight="bold", color="#333a45", pad=10)
    file = PICTURES / f"{name}.png"
    # Without the version of matplotlib the same picture is the same file.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return file


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, family in FAMILIES.items():
        file = draw(name, family)
        print(f"{file.name}: {file.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
