"""The suite's cases: a random stream that straddles kernel tiles, and the named ones it must not miss."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rmt_kernels import Region, Rule, SegmentLayout
from tests.suite import BF16, F16, F32, Case

__all__ = ["NAMED", "PRESETS", "draw", "free_layout", "preset_layout"]

HEAD_DIMS = (1, 8, 16, 32, 41, 64, 80, 96, 128, 160, 256)
Rows = Callable[[int], int]

# Every preset, as a function of how many rows to give a region.
PRESETS: dict[str, Callable[[Rows], SegmentLayout]] = {
    "rmt_decoder": lambda rows: SegmentLayout.rmt_decoder(rows(200), rows(40)),
    "rmt_decoder cached": lambda rows: SegmentLayout.rmt_decoder(rows(130), rows(40), cache=rows(130)),
    "rmt_decoder read_cache": lambda rows: SegmentLayout.rmt_decoder(
        rows(130), rows(40), cache=rows(130), read_cache=True
    ),
    "rmt_decoder window": lambda rows: SegmentLayout.rmt_decoder(
        rows(200), rows(40), cache=rows(100), window=1 + rows(100)
    ),
    "causal": lambda rows: SegmentLayout.causal(rows(200), rows(40), cache=rows(70)),
    "rmt_encoder": lambda rows: SegmentLayout.rmt_encoder(rows(200), rows(40)),
    "transformer_xl": lambda rows: SegmentLayout.transformer_xl(rows(150), rows(150)),
    "transformer_xl memory": lambda rows: SegmentLayout.transformer_xl(rows(100), rows(130), memory=rows(30)),
    "transformer_xl same length": lambda rows: _same_length(rows(130), 1 + rows(130)),
    "memory_transformer": lambda rows: SegmentLayout.memory_transformer(rows(150), rows(40)),
    "memory_bottleneck write": lambda rows: SegmentLayout.memory_bottleneck(rows(200), rows(40), step="write"),
    "memory_bottleneck read": lambda rows: SegmentLayout.memory_bottleneck(rows(200), rows(40), step="read"),
    "memformer_read": lambda rows: SegmentLayout.memformer_read(rows(200), rows(70)),
    "memformer_write": lambda rows: SegmentLayout.memformer_write(rows(200), rows(70)),
    "membart": lambda rows: SegmentLayout.membart(rows(200), rows(70)),
}


def _same_length(tokens: int, cache: int) -> SegmentLayout:
    return SegmentLayout.transformer_xl(tokens, cache, window=cache)


def tile_straddling(rng: random.Random) -> Rows:
    """Draws numbers of rows: none, one, next to a multiple of a tile's size, or any."""

    def rows(most: int) -> int:
        kind = rng.random()
        if kind < 0.16:
            return min(most, rng.choice((0, 1)))
        if kind < 0.7:
            tile = rng.choice([size for size in (16, 32, 64) if size <= most + 1] or [1])
            return max(0, min(most, tile * rng.randint(1, max(1, most // tile)) + rng.choice((-1, 0, 1))))
        return rng.randint(1, most)

    return rows


def preset_layout(rng: random.Random) -> SegmentLayout:
    """A preset of random sizes."""
    return PRESETS[rng.choice(list(PRESETS))](tile_straddling(rng))


def free_layout(rng: random.Random) -> SegmentLayout:
    """A random table of rules that is accepted, over random regions."""
    rows = tile_straddling(rng)
    while True:
        try:
            return SegmentLayout(**free_table(rng, rows))
        except ValueError:
            continue


def free_table(rng: random.Random, rows: Rows) -> dict[str, Any]:
    """The arguments of a random SegmentLayout, accepted or not."""
    names = ("read", "tokens", "write")
    rules = {
        (query, key): rng.choice((Rule.NONE, Rule.FULL, Rule.FULL, *((Rule.CAUSAL, Rule.SELF) if query == key else ())))
        for query in names
        for key in ("cache", *names)
    }
    queries = tuple(name for name in names if rng.random() < 0.8) or ("tokens",)
    keys = tuple(name for name in ("cache", *names) if rng.random() < 0.85)
    slides = rules["tokens", "tokens"] is Rule.CAUSAL and "tokens" in keys and rng.random() < 0.6
    return {
        "cache": rows(100), "read": rows(40), "tokens": rows(130), "write": rows(40), "rules": rules,
        "queries": queries, "keys": keys, "window": 1 + rows(130) if slides else None,
    }  # fmt: skip


def draw(number: int) -> Case:
    """The case of that number, always the same."""
    rng = random.Random(number)
    layout = free_layout(rng) if rng.random() < 0.4 else preset_layout(rng)
    start = False
    if layout.num_queries and rng.random() < 0.15:
        layout = layout.last(rng.randint(0, layout.num_queries))
    elif layout.tokens and Region.TOKENS in layout.queries and rng.random() < 0.15:
        layout, start = layout.decoding(rng.choice((1, rng.randint(1, layout.tokens)))), True

    batch, kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2)), rng.choice((1, 1, 2, 3, 4))
    # Dense float64 matrices of this size keep a case well under a second.
    while batch * kv_heads * group * layout.num_queries * layout.num_keys > 700_000 and batch * kv_heads * group > 1:
        if group > 1:
            group -= 1
        elif kv_heads > 1:
            kv_heads -= 1
        else:
            batch -= 1
    cached = layout.key_size("cache") > 0
    return Case(
        layout, batch, kv_heads, group,
        head_dim=rng.choice(HEAD_DIMS),
        dtype=rng.choice((F32, F32, BF16, BF16, F16)),
        padding=rng.choice(("", "right", "left")) if layout.tokens else "",
        stale=cached and rng.random() < 0.4,
        start=start,
        apart=(cached and rng.random() < 0.5) or rng.random() < 0.03,
        dropout_p=rng.choice((0.0, 0.0, 0.1, 0.5)),
        scale=rng.choice((None, None, None, 0.3, -0.2, 0.0)),
        strides=rng.choice(("plain", "projected", "projected", "sliced", "column", "expanded")),
        grads=rng.choice(("both", "both", "out", "sum", "lse")),
        seed=number,
    )  # fmt: skip


def _named() -> dict[str, Case]:
    """What a random stream could miss."""
    decoder = SegmentLayout.rmt_decoder(97, 8, cache=33)
    cases = {
        f"{name} {kind}": Case(make(lambda most: min(most, 47)), head_dim=41, dtype=dtype, seed=3)
        for name, make in PRESETS.items()
        for kind, dtype in (("f32", F32), ("bf16", BF16), ("f16", F16))
    }
    for region in ("cache", "read", "tokens", "write"):
        for size in (0, 1):
            sizes: dict[str, Any] = {region: size}
            cases[f"{region} of {size}"] = Case(replace(decoder, **sizes))
    base = Case(decoder, batch=3, kv_heads=2, group=3, head_dim=64)
    cases |= {f"head_dim {d}": replace(base, batch=1, head_dim=d) for d in (*HEAD_DIMS, 2, 15, 17, 63, 65, 129, 255)}
    cases |= {f"group {n}": replace(base, group=n, dtype=BF16) for n in (1, 2, 3, 4)}
    cases |= {f"strides {s}": replace(base, strides=s) for s in ("projected", "sliced", "column", "expanded")}
    cases |= {
        f"strides {s} bf16": replace(cases[f"strides {s}"], dtype=BF16) for s in ("projected", "sliced", "column")
    }
    cases |= {f"gradient of {g}": replace(base, grads=g) for g in ("out", "lse", "sum")}
    cases |= {f"scale {s}": replace(base, scale=s) for s in (0.0, -0.125, 1.0, 2)}
    for padding in ("right", "left"):
        cases[f"padded {padding}"] = replace(base, padding=padding, stale=True)
        cases[f"padded {padding}, window"] = replace(
            base, padding=padding, layout=SegmentLayout.rmt_decoder(97, 8, cache=33, window=20)
        )
        cases[f"padded {padding}, no memory"] = replace(
            base, padding=padding, layout=SegmentLayout.transformer_xl(65, 0), dtype=BF16
        )
        cases[f"padded {padding}, encoder"] = replace(base, padding=padding, layout=SegmentLayout.rmt_encoder(97, 8))
        cases[f"padded {padding}, cross"] = replace(base, padding=padding, layout=SegmentLayout.memformer_read(97, 8))
        cases[f"padded {padding}, slots"] = replace(base, padding=padding, layout=SegmentLayout.memformer_write(97, 8))
        cases[f"padded {padding}, membart"] = replace(base, padding=padding, layout=SegmentLayout.membart(97, 33))
        cases[f"padded {padding}, dropout"] = replace(base, padding=padding, dropout_p=0.3, apart=True)
        cases[f"padded {padding}, decoding"] = replace(base, padding=padding, layout=decoder.decoding(5), start=True)
    for kind, dtype in (("f32", F32), ("bf16", BF16), ("f16", F16)):
        case = replace(base, dtype=dtype)
        cases |= {
            f"cache apart {kind}": replace(case, apart=True, stale=True),
            f"dropout {kind}": replace(case, dropout_p=0.25),
            f"dropout almost all {kind}": replace(case, dropout_p=0.99),
            f"large scores {kind}": replace(case, scores="large"),
            f"huge scores {kind}": replace(case, scale=1024.0 if dtype is F16 else 2.0**40),
            f"low scores {kind}": replace(case, scores="low" if dtype is not F16 else "random", scale=-1.0),
            f"decoding one row {kind}": replace(case, layout=decoder.decoding(), start=True, apart=True),
            f"last row {kind}": replace(case, layout=decoder.last(1)),
        }
    # Few rows and so many keys that they are split over programs.
    long = replace(base, batch=3, kv_heads=1, group=4, head_dim=41)
    for kind, dtype in (("f32", F32), ("f16", F16), ("bf16", BF16)):
        case = replace(long, dtype=dtype)
        cases |= {
            f"split, decoding {kind}": replace(
                case, layout=SegmentLayout.rmt_decoder(1190, 8, cache=33).decoding(2), start=True, stale=True
            ),
            f"split, slots {kind}": replace(case, layout=SegmentLayout.memformer_write(1100, 3), padding="right"),
        }
    cases |= {
        "split, dropout": replace(long, layout=SegmentLayout.rmt_decoder(700, 2).last(3), dropout_p=0.3, apart=True),
        "split, window": replace(
            long, layout=SegmentLayout.rmt_decoder(1190, 8, cache=33, window=600).decoding(), start=True, padding="left"
        ),
        "split, nothing seen": replace(long, layout=SegmentLayout(read=600, tokens=3, queries=("tokens",))),
        "group of 34": replace(base, batch=1, kv_heads=1, group=34, head_dim=16, padding="left"),
        "group of 17, decoding": replace(
            base, batch=2, kv_heads=1, group=17, layout=decoder.decoding(), start=True, dtype=F16
        ),
    }
    window = SegmentLayout.rmt_decoder(130, 5, cache=65, window=1)
    no_keys = SegmentLayout(tokens=5, queries=("tokens",), keys=())
    cases |= {
        "window 1": replace(base, layout=window),
        "window of all": replace(base, layout=replace(window, window=195)),
        "window, decoding": replace(base, layout=replace(window, window=40).decoding(3), start=True, padding="left"),
        "no batch": replace(base, batch=0),
        "no queries": replace(base, layout=decoder.last(0)),
        "no rows": replace(base, layout=SegmentLayout()),
        "no keys": replace(base, layout=no_keys),
        "no keys, padded": replace(base, layout=no_keys, padding="left"),
        "nothing seen": replace(base, layout=SegmentLayout(read=3, tokens=40)),
        "only itself": replace(base, layout=SegmentLayout(tokens=70, rules={("tokens", "tokens"): Rule.SELF})),
        "some see nothing": replace(
            base, layout=SegmentLayout(read=20, tokens=70, rules={("tokens", "read"): Rule.FULL})
        ),
        "empty cache apart": replace(base, layout=SegmentLayout.rmt_decoder(40, 3), apart=True),
        "all in the cache": replace(
            base, apart=True,
            layout=SegmentLayout(
                cache=90, tokens=20, keys=("cache",), queries=("tokens",), rules={("tokens", "cache"): Rule.FULL}
            ),
        ),
    }  # fmt: skip
    return cases


NAMED = _named()
