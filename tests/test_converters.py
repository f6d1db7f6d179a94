"""The authors' checkpoints, made here under their names, against networks that read those names themselves."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.models import RMTTransformerXL, TransformerXL
from rmt_kernels.models.blocks import Distances
from rmt_kernels.models.converters import load_rmt_transformer_xl, load_rmt_wrapper

State = dict[str, Tensor]
VOCABULARY, WIDTH, HEADS, INNER, LAYERS, MEMORY, TOKENS = 9, 12, 3, 10, 2, 3, 4


def drawn(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> State:
    return {name: (0.6 * torch.randn(shape, dtype=torch.float64)).to(dtype) for name, shape in shapes.items()}


def transformer_xl(memory: int = MEMORY, tied: bool = True, shared: bool = True) -> State:
    """What ``MemTransformerLM(...).state_dict()`` holds: the names and shapes of the authors' code."""
    head_dim = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {"mem_tokens": (memory, 1, WIDTH)} if memory else {}
    shapes |= {"word_emb.emb_layers.0.weight": (VOCABULARY, WIDTH)}
    if shared:
        shapes |= {"r_w_bias": (HEADS, head_dim), "r_r_bias": (HEADS, head_dim)}
    for i in range(LAYERS):
        if not shared:
            shapes |= {f"layers.{i}.dec_attn.{name}": (HEADS, head_dim) for name in ("r_w_bias", "r_r_bias")}
        shapes |= {
            f"layers.{i}.dec_attn.qkv_net.weight": (3 * WIDTH, WIDTH),
            f"layers.{i}.dec_attn.o_net.weight": (WIDTH, WIDTH),
            f"layers.{i}.dec_attn.layer_norm.weight": (WIDTH,),
            f"layers.{i}.dec_attn.layer_norm.bias": (WIDTH,),
            f"layers.{i}.dec_attn.r_net.weight": (WIDTH, WIDTH),
            f"layers.{i}.pos_ff.CoreNet.0.weight": (INNER, WIDTH),
            f"layers.{i}.pos_ff.CoreNet.0.bias": (INNER,),
            f"layers.{i}.pos_ff.CoreNet.3.weight": (WIDTH, INNER),
            f"layers.{i}.pos_ff.CoreNet.3.bias": (WIDTH,),
            f"layers.{i}.pos_ff.layer_norm.weight": (WIDTH,),
            f"layers.{i}.pos_ff.layer_norm.bias": (WIDTH,),
        }
    shapes |= {"crit.out_layers.0.weight": (VOCABULARY, WIDTH), "crit.out_layers.0.bias": (VOCABULARY,)}
    state = drawn(shapes)
    state["pos_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0.0, WIDTH, 2.0) / WIDTH)
    if tied:
        state["crit.out_layers.0.weight"] = state["word_emb.emb_layers.0.weight"]
    return state


def shift(scores: Tensor) -> Tensor:
    """The shift of Transformer-XL's code: a column of zeros in front, the same numbers read in rows one longer."""
    rows, keys = scores.shape
    padded = torch.cat([torch.zeros(rows, 1, dtype=scores.dtype), scores], dim=1)
    return padded.view(keys + 1, rows)[1:].reshape(rows, keys)


def dense_transformer_xl(
    w: State, ids: Tensor, memory: int, cache: int, read_cache: bool, same_length: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) and last memory (M, width) of one sample of whole segments."""
    rate = 1 / 10000 ** (torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    state = w["mem_tokens"][:, 0] if memory else torch.zeros(0, WIDTH, dtype=torch.float64)
    caches = [torch.zeros(0, WIDTH, dtype=torch.float64)] * LAYERS
    logits = []
    for segment in ids.split(TOKENS):
        x = torch.cat([state, w["word_emb.emb_layers.0.weight"][segment] * math.sqrt(WIDTH), state])
        rows, held = len(x), len(caches[0])
        keys = held + rows
        hidden = torch.ones(rows, keys).triu(1 + held).bool()
        if same_length:  # row i, whose own key is held + i, sees `cache` keys
            hidden |= torch.arange(rows)[:, None] + held - torch.arange(keys) >= cache
        if memory:
            hidden[:memory, held : held + memory] = False
            hidden[-memory:, -memory:] = False
            hidden[:memory, :held] = hidden[-memory:, :held] = not read_cache
        angles = torch.arange(keys - 1, -1, -1, dtype=torch.float64)[:, None] * rate
        positions, inputs = torch.cat([angles.sin(), angles.cos()], dim=1), []
        for i, old in enumerate(caches):
            inputs.append(x)
            name = f"layers.{i}.dec_attn"
            q, k, v = (torch.cat([old, x]) @ w[f"{name}.qkv_net.weight"].T).chunk(3, dim=1)
            r = positions @ w[f"{name}.r_net.weight"].T
            outs = []
            for head, mine in enumerate(torch.arange(WIDTH).view(HEADS, -1)):
                u, b = (w.get(key, w.get(f"{name}.{key}")) for key in ("r_w_bias", "r_r_bias"))
                assert u is not None
                assert b is not None
                query = q[-rows:, mine]
                scores = (query + u[head]) @ k[:, mine].T + shift((query + b[head]) @ r[:, mine].T)
                scores = scores / math.sqrt(WIDTH // HEADS)
                outs.append(scores.masked_fill(hidden, -torch.inf).softmax(dim=1) @ v[:, mine])
            x = layer_norm(w, f"{name}.layer_norm", x + torch.cat(outs, dim=1) @ w[f"{name}.o_net.weight"].T)
            feed = f"layers.{i}.pos_ff"
            inner = torch.relu(x @ w[f"{feed}.CoreNet.0.weight"].T + w[f"{feed}.CoreNet.0.bias"])
            inner = inner @ w[f"{feed}.CoreNet.3.weight"].T + w[f"{feed}.CoreNet.3.bias"]
            x = layer_norm(w, f"{feed}.layer_norm", x + inner)
        caches = [torch.cat([old, new])[max(0, keys - cache) :] for old, new in zip(caches, inputs, strict=True)]
        state = x[rows - memory :]
        out = x[memory : memory + TOKENS]
        logits.append(out @ w["crit.out_layers.0.weight"].T + w["crit.out_layers.0.bias"])
    return torch.cat(logits), state


def layer_norm(w: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])


@pytest.mark.parametrize("read_cache", [False, True])
@pytest.mark.parametrize("cache", [0, 3, TOKENS + 2 * MEMORY, 14])
@pytest.mark.parametrize(("tied", "shared"), [(True, True), (False, False)])
def test_a_converted_transformer_xl_computes_what_the_authors_does(
    tied: bool, shared: bool, cache: int, read_cache: bool
) -> None:
    state = transformer_xl(tied=tied, shared=shared)
    model = load_rmt_transformer_xl(state, tokens=TOKENS, cache=cache, read_cache=read_cache, backend="reference")
    assert isinstance(model, RMTTransformerXL)
    assert model.config.tied is tied
    ids = torch.randint(VOCABULARY, (2, 3 * TOKENS))
    out = model(ids, outputs="logits")
    assert out.outputs is not None
    for b in range(2):
        logits, memory = dense_transformer_xl(state, ids[b], MEMORY, cache, read_cache)
        torch.testing.assert_close(out.outputs[b], logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(out.memory[0][b], memory, rtol=0, atol=1e-9)


@pytest.mark.parametrize("same_length", [False, True])
def test_a_checkpoint_without_memory_is_plain_transformer_xl(same_length: bool) -> None:
    state = transformer_xl(memory=0)
    model = load_rmt_transformer_xl(state, tokens=TOKENS, cache=TOKENS, same_length=same_length, backend="reference")
    assert type(model) is TransformerXL
    ids = torch.randint(VOCABULARY, (1, 3 * TOKENS))
    out = model(ids, outputs="logits").outputs
    assert out is not None
    logits, _ = dense_transformer_xl(state, ids[0], 0, TOKENS, False, same_length)
    torch.testing.assert_close(out[0], logits, rtol=0, atol=1e-9)


def test_the_shift_is_not_what_clean_distances_give() -> None:
    """So the equality above says something of the rows that see ahead."""
    state = transformer_xl()
    model = load_rmt_transformer_xl(state, tokens=TOKENS, cache=3, backend="reference")
    ids = torch.randint(VOCABULARY, (1, 2 * TOKENS))
    before = model(ids, outputs="logits").outputs
    for part in model.modules():
        if isinstance(part, Distances):
            part.mode = "clean"
    after = model(ids, outputs="logits").outputs
    assert before is not None
    assert after is not None
    assert not torch.allclose(before, after, atol=1e-3)


def wrapper(tied: bool = True, buffers: bool = True, positions: int = 32, dtype: torch.dtype = torch.float64) -> State:
    """What ``RecurrentWrapper(MemoryCell(GPT2LMHeadModel(...), M)).state_dict()`` holds."""
    gpt = "memory_cell.model.transformer"
    shapes: dict[str, tuple[int, ...]] = {
        "memory_cell.memory": (MEMORY, WIDTH),
        f"{gpt}.wte.weight": (VOCABULARY, WIDTH),
        f"{gpt}.wpe.weight": (positions, WIDTH),
    }
    for i in range(LAYERS):
        shapes |= {
            f"{gpt}.h.{i}.ln_1.weight": (WIDTH,),
            f"{gpt}.h.{i}.ln_1.bias": (WIDTH,),
            f"{gpt}.h.{i}.attn.c_attn.weight": (WIDTH, 3 * WIDTH),
            f"{gpt}.h.{i}.attn.c_attn.bias": (3 * WIDTH,),
            f"{gpt}.h.{i}.attn.c_proj.weight": (WIDTH, WIDTH),
            f"{gpt}.h.{i}.attn.c_proj.bias": (WIDTH,),
            f"{gpt}.h.{i}.ln_2.weight": (WIDTH,),
            f"{gpt}.h.{i}.ln_2.bias": (WIDTH,),
            f"{gpt}.h.{i}.mlp.c_fc.weight": (WIDTH, INNER),
            f"{gpt}.h.{i}.mlp.c_fc.bias": (INNER,),
            f"{gpt}.h.{i}.mlp.c_proj.weight": (INNER, WIDTH),
            f"{gpt}.h.{i}.mlp.c_proj.bias": (WIDTH,),
        }
    shapes |= {f"{gpt}.ln_f.weight": (WIDTH,), f"{gpt}.ln_f.bias": (WIDTH,)}
    shapes |= {"memory_cell.model.lm_head.weight": (VOCABULARY, WIDTH)}
    state = drawn(shapes, dtype)
    if buffers:
        for i in range(LAYERS):
            state[f"{gpt}.h.{i}.attn.bias"] = torch.ones(1, 1, positions, positions, dtype=torch.bool).tril()
            state[f"{gpt}.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if tied:
        state["memory_cell.model.lm_head.weight"] = state[f"{gpt}.wte.weight"]
    return state


def dense_wrapper(w: State, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) and last memory of one sample, segments of their true lengths."""
    gpt, memory = "memory_cell.model.transformer", w["memory_cell.memory"]
    logits = []
    for segment in ids.split(TOKENS):
        x = torch.cat([memory, w[f"{gpt}.wte.weight"][segment], memory])
        x = x + w[f"{gpt}.wpe.weight"][: len(x)]
        ahead = torch.ones(len(x), len(x)).triu(1).bool()
        for i in range(LAYERS):
            block = f"{gpt}.h.{i}"
            y = layer_norm(w, f"{block}.ln_1", x)
            q, k, v = (y @ w[f"{block}.attn.c_attn.weight"] + w[f"{block}.attn.c_attn.bias"]).split(WIDTH, dim=1)
            outs = []
            for mine in torch.arange(WIDTH).view(HEADS, -1):
                scores = (q[:, mine] @ k[:, mine].T / math.sqrt(WIDTH // HEADS)).masked_fill(ahead, -torch.inf)
                outs.append(scores.softmax(dim=1) @ v[:, mine])
            x = x + torch.cat(outs, dim=1) @ w[f"{block}.attn.c_proj.weight"] + w[f"{block}.attn.c_proj.bias"]
            y = layer_norm(w, f"{block}.ln_2", x) @ w[f"{block}.mlp.c_fc.weight"] + w[f"{block}.mlp.c_fc.bias"]
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + y @ w[f"{block}.mlp.c_proj.weight"] + w[f"{block}.mlp.c_proj.bias"]
        x = layer_norm(w, f"{gpt}.ln_f", x)
        memory = x[-MEMORY:]
        logits.append(x[MEMORY:-MEMORY] @ w["memory_cell.model.lm_head.weight"].T)
    return torch.cat(logits), memory


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_wrapper_computes_what_the_authors_does(tied: bool) -> None:
    state = wrapper(tied)
    model = load_rmt_wrapper(state, tokens=TOKENS, heads=HEADS, backend="reference")
    assert model.config.layout == "causal"
    assert model.config.tied is tied
    ids = torch.randint(VOCABULARY, (2, 3 * TOKENS))
    out = model(ids, outputs="logits")
    assert out.outputs is not None
    for b in range(2):
        logits, memory = dense_wrapper(state, ids[b])
        torch.testing.assert_close(out.outputs[b], logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(out.memory[b], memory, rtol=0, atol=1e-9)
    short, _ = dense_wrapper(state, ids[0, :-2])
    found = model(ids[:1, :-2], outputs="logits").outputs
    assert found is not None
    torch.testing.assert_close(found[0], short, rtol=0, atol=1e-9)


def test_a_wrapper_may_be_saved_in_parts_and_in_parallel() -> None:
    state = wrapper(buffers=False, dtype=torch.float32)
    del state["memory_cell.model.lm_head.weight"]  # tied weights are left out of some files
    ids = torch.randint(VOCABULARY, (1, TOKENS))
    outs = []
    for version in (
        state,
        {name.removeprefix("memory_cell."): value for name, value in state.items()},
        {f"module.{name}": value for name, value in state.items()},
    ):
        model = load_rmt_wrapper(version, tokens=TOKENS, heads=HEADS)
        assert model.config.tied
        assert next(model.parameters()).dtype is torch.float32
        outs.append(model(ids, outputs="logits").outputs)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_a_checkpoint_is_read_from_a_file_without_executing_any(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    state = wrapper()
    torch.save(state, path)
    model = load_rmt_wrapper(path, tokens=TOKENS, heads=HEADS, backend="reference")
    assert torch.equal(model.recurrence.initial_memory, state["memory_cell.memory"])

    torch.save({"state": state, "more": Hostile(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"model.pt holds no state dict of tensors alone .*save state_dict\(\)"):
        load_rmt_wrapper(str(path), tokens=TOKENS, heads=HEADS)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="holds no state dict of tensors alone"):
        load_rmt_transformer_xl(path, tokens=TOKENS)
    torch.save({"step": 5, "model": state}, path)
    with pytest.raises(TypeError, match=r"'step', 'model'.*give the model's state dict alone"):
        load_rmt_wrapper(path, tokens=TOKENS, heads=HEADS)
    with pytest.raises(FileNotFoundError):
        load_rmt_wrapper(tmp_path / "none.pt", tokens=TOKENS, heads=HEADS)


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_hostile_pickle_would_have_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_everything_that_is_wrong_is_told_at_once() -> None:
    state = wrapper()
    gpt = "memory_cell.model.transformer"
    del state[f"{gpt}.h.1.ln_1.bias"]
    state[f"{gpt}.h.0.attn.c_attn.weight"] = state[f"{gpt}.h.0.attn.c_attn.weight"].T
    state[f"{gpt}.h.0.crossattention.bias"] = torch.zeros(2)
    state[f"{gpt}.ln_f.weight"] = state[f"{gpt}.ln_f.weight"].long()
    with pytest.raises(ValueError) as error:
        load_rmt_wrapper(state, tokens=TOKENS, heads=HEADS)
    for line in (
        "not a state dict of the RMT wrapper around GPT-2",
        "missing: model.transformer.h.1.ln_1.bias (12,)",
        "another shape: model.transformer.h.0.attn.c_attn.weight (36, 12), expected (12, 36)",
        "unknown: model.transformer.h.0.crossattention.bias (2,)",
        "no floating-point numbers: model.transformer.ln_f.weight torch.int64",
    ):
        assert line in str(error.value)

    state = transformer_xl()
    del state["layers.0.pos_ff.CoreNet.0.weight"], state["r_r_bias"]
    state["mem_tokens"] = state["mem_tokens"][:, 0]
    state["layers.1.dec_attn.extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        load_rmt_transformer_xl(state, tokens=TOKENS)
    for line in (
        "missing: layers.0.pos_ff.CoreNet.0.weight",
        "missing: r_r_bias (3, 4)",
        "another shape: mem_tokens (3, 12), expected ('any', 1, 12)",
        "unknown: layers.1.dec_attn.extra (1,)",
    ):
        assert line in str(error.value)


def test_one_kind_of_checkpoint_is_not_the_other() -> None:
    with pytest.raises(ValueError, match=r"not a state dict of the Transformer-XL .*\n  missing: word_emb"):
        load_rmt_transformer_xl(wrapper(), tokens=TOKENS)
    with pytest.raises(ValueError, match=r"not a state dict of the RMT wrapper .*\n  missing: model.transformer.wte"):
        load_rmt_wrapper(transformer_xl(), tokens=TOKENS, heads=HEADS)
    with pytest.raises(ValueError, match="missing"):
        load_rmt_wrapper({}, tokens=TOKENS, heads=HEADS)
    with pytest.raises(TypeError, match="state dict or the path of one, got int"):
        load_rmt_wrapper(5, tokens=TOKENS, heads=HEADS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("crit.cluster_weight", "an adaptive softmax .*cluster_weight.*without --adaptive"),
        ("word_emb.emb_layers.1.weight", "an adaptive softmax"),
        ("word_emb.emb_projs_0", "embeddings projected to the width"),
        ("crit.out_projs_0", "embeddings projected"),
        ("r_emb", "another attention than the default"),
    ],
)
def test_variants_of_transformer_xl_that_are_not_served(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rmt_transformer_xl(transformer_xl() | {entry: torch.zeros(2, WIDTH)}, tokens=TOKENS)


def test_sizes_that_a_checkpoint_does_not_allow() -> None:
    with pytest.raises(ValueError, match="needs 33 positions, and the checkpoint has 32; give at most 26"):
        load_rmt_wrapper(wrapper(), tokens=27, heads=HEADS)
    with pytest.raises(ValueError, match="multiple of heads, got 12 and 5"):
        load_rmt_wrapper(wrapper(), tokens=TOKENS, heads=5)
    with pytest.raises(ValueError, match="same_length: with memory"):
        load_rmt_transformer_xl(transformer_xl(), tokens=TOKENS, cache=4, same_length=True)
    with pytest.raises(ValueError, match="cache must be at least 1 for transformer_xl"):
        load_rmt_transformer_xl(transformer_xl(memory=0), tokens=TOKENS)
    state = transformer_xl() | {"r_w_bias": torch.zeros(5, 2), "r_r_bias": torch.zeros(5, 2)}
    with pytest.raises(ValueError, match="5 heads do not divide the width 12"):
        load_rmt_transformer_xl(state, tokens=TOKENS)
