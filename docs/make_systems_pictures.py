"""Draws the layouts of the chapter on the published systems, with ``SegmentLayout.plot``.

Run ``python docs/make_systems_pictures.py`` after a change of a layout or of its drawing. Needs matplotlib. Pictures of
measured numbers are written by ``python -m benchmarks.systems TABLE --render FILE --docs``.
"""

from __future__ import annotations

from make_pictures import draw

from rmt_kernels import SegmentLayout

FAMILIES: dict[str, list[list[tuple[str, SegmentLayout]]]] = {
    "systems_rmt": [
        [
            ("RMT, layout=rmt_decoder", SegmentLayout.rmt_decoder(16, 5)),
            ("RMT, layout=causal", SegmentLayout.causal(16, 5)),
        ]
    ],
    "systems_rmt_encoder": [[("RMT, encoder", SegmentLayout.rmt_encoder(19, 5))]],
    "systems_transformer_xl": [
        [
            ("Transformer-XL", SegmentLayout.transformer_xl(16, 12)),
            ("RMT on Transformer-XL", SegmentLayout.transformer_xl(16, 12, memory=5)),
        ]
    ],
    "systems_memory_transformer": [
        [
            ("MemTransformer, MemCtrl", SegmentLayout.memory_transformer(16, 7)),
            ("MemBottleneck, 1: memory", SegmentLayout.memory_bottleneck(16, 7, step="write")),
            ("MemBottleneck, 2: tokens", SegmentLayout.memory_bottleneck(16, 7, step="read")),
        ]
    ],
    "systems_memformer": [
        [
            ("Memformer, read", SegmentLayout.memformer_read(16, 7)),
            ("Memformer, write", SegmentLayout.memformer_write(16, 7)),
            ("MemBART", SegmentLayout.membart(16, 7)),
        ]
    ],
}


def main() -> None:
    for name, family in FAMILIES.items():
        file = draw(name, family)
        print(f"{file.name}: {file.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
