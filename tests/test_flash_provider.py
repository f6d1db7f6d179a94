"""The provider for PyTorch's flash-attention registry: idle until activated, right while active, gone when restored."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from rmt_kernels import ops
from rmt_kernels.backends import cpu
from rmt_kernels.integrations import flash
from tests.suite import BF16, F16, F32, F64, RMS_TOLERANCE

pytestmark = pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)

CPU_OP = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Untyped, as the dispatcher calls them.
SDPA_FORWARD: Callable[..., Any] = flash._sdpa_forward
SDPA_BACKWARD: Callable[..., Any] = flash._sdpa_backward
FLASH_FORWARD: Callable[..., Any] = flash._flash_forward
FLASH_BACKWARD: Callable[..., Any] = flash._flash_backward
STRIDES = ("heads outside", "rows outside", "fused", "expanded", "last stride 2")


class Counted:
    """How often the CPU kernels ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward = self.backward = 0
        forward, backward = ops._FORWARD["cpu"], ops._BACKWARD["cpu"]

        def run_forward(*args: Any) -> tuple[Tensor, Tensor]:
            self.forward += 1
            return forward(*args)

        def run_backward(*args: Any) -> ops.Gradients:
            self.backward += 1
            return backward(*args)

        monkeypatch.setitem(ops._FORWARD, "cpu", run_forward)
        monkeypatch.setitem(ops._BACKWARD, "cpu", run_backward)

    @property
    def both(self) -> tuple[int, int]:
        return self.forward, self.backward


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def active() -> Iterator[None]:
    flash.register_flash_provider()
    activate_flash_attention_impl(flash.NAME)
    yield
    restore_flash_attention_impl(_raise_warn=False)


def draw(batch: int, heads: int, rows: int, head_dim: int, dtype: torch.dtype = F32, strides: str = "") -> Tensor:
    """(batch, heads, rows, head_dim), lying in memory as ``strides`` says."""
    shape = (batch, heads, rows, head_dim)
    if strides == "rows outside":
        return torch.randn(batch, rows, heads, head_dim).to(dtype).transpose(1, 2)
    if strides == "fused":
        return torch.randn(batch, rows, 3, heads, head_dim).to(dtype)[:, :, 1].transpose(1, 2)
    if strides == "expanded":
        return torch.randn(batch, 1, rows, head_dim).to(dtype).expand(shape)
    if strides == "last stride 2":
        return torch.randn(*shape, 2).to(dtype)[..., 1]
    return torch.randn(shape).to(dtype)


def problem(
    queries: int, keys: int, dtype: torch.dtype = F32, strides: str = "", kv_heads: int = 4, head_dim: int = 24
) -> tuple[list[Tensor], Tensor]:
    """query, key, value with 4 query heads, and a gradient of the output."""
    torch.manual_seed(queries * 1009 + keys)
    sizes = ((4, queries), (kv_heads, keys), (kv_heads, keys), (4, queries))
    query, key, value, grad = (draw(2, heads, rows, head_dim, dtype, strides) for heads, rows in sizes)
    return [query, key, value], grad


def mask(queries: int, keys: int, causal: str | None) -> Tensor:
    diagonal = {"first": 0, "last": keys - queries, None: keys}[causal]
    return torch.ones(queries, keys, dtype=torch.bool).tril(diagonal)


def exact(
    tensors: list[Tensor], grad: Tensor, causal: str | None, scale: float | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, logsumexp and gradients in float64, written out."""
    query, key, value = leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask(query.shape[2], key.shape[2], causal), float("-inf"))
    out = scores.softmax(-1) @ value
    return out.detach(), scores.logsumexp(-1).detach(), list(torch.autograd.grad(out, leaves, grad.double()))


def assert_close(result: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert result.shape == expected.shape
    assert result.dtype is dtype
    error = (result.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= factor * RMS_TOLERANCE[dtype], error


def sdpa(tensors: list[Tensor], grad: Tensor, **how: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    query, key, value = leaves
    out = F.scaled_dot_product_attention(query, key, value, **how)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad))


def test_idle_on_import() -> None:
    """Neither the package nor the module registers, and registering does not activate."""
    code = """
import torch, rmt_kernels, rmt_kernels.integrations.flash as flash
from torch.nn import attention
op = "aten::_scaled_dot_product_flash_attention_for_cpu"
before = torch._C._dispatch_dump(op)
assert "rmt_kernels" not in attention.list_flash_attention_impls()
flash.register_flash_provider()
flash.register_flash_provider()
assert attention.list_flash_attention_impls().count("rmt_kernels") == 1
assert attention.current_flash_attention_impl() is None and torch._C._dispatch_dump(op) == before
attention.activate_flash_attention_impl("rmt_kernels")  # and leaving while it is active does no harm
assert torch._C._dispatch_dump(op) != before
"""
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_only_while_active(counted: Counted) -> None:
    tensors, grad = problem(7, 7)
    names = [f"aten::{name}" for name, _, _ in flash._OPERATORS if hasattr(torch.ops.aten, name)]
    assert len(names) >= 6
    before = [torch._C._dispatch_dump(name) for name in names]
    own = sdpa(tensors, grad)
    flash.register_flash_provider()
    sdpa(tensors, grad)
    assert counted.both == (0, 0)

    activate_flash_attention_impl(flash.NAME)
    assert attention.current_flash_attention_impl() == flash.NAME
    sdpa(tensors, grad)
    flash.register_flash_provider()  # while active
    activate_flash_attention_impl(flash.NAME)
    sdpa(tensors, grad)
    assert counted.both == (2, 2)

    restore_flash_attention_impl()
    again = sdpa(tensors, grad)
    assert counted.both == (2, 2)
    assert [torch._C._dispatch_dump(name) for name in names] == before
    assert torch.equal(own[0], again[0])
    assert all(map(torch.equal, own[1], again[1]))


def test_remove_twice_and_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    name = flash._OPERATORS[0][0]
    before = torch._C._dispatch_dump(f"aten::{name}")
    handle = flash._Active()
    handle.remove()
    handle.remove()
    assert torch._C._dispatch_dump(f"aten::{name}") == before
    monkeypatch.setattr(flash, "_OPERATORS", (flash._OPERATORS[0], ("_flash_attention_backward", "nowhere", print)))
    with pytest.raises((RuntimeError, AttributeError)):
        flash._Active()
    assert torch._C._dispatch_dump(f"aten::{name}") == before


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (33, 33), (17, 70), (70, 17), (1, 65), (65, 1)])
def test_equals_float64(queries: int, keys: int, causal: bool, dtype: torch.dtype, counted: Counted) -> None:
    tensors, grad = problem(queries, keys, dtype)
    out, gradients = sdpa(tensors, grad, is_causal=causal, scale=0.3)
    assert counted.both == (1, 1)
    expected, _, expected_gradients = exact(tensors, grad, "first" if causal else None, 0.3)
    assert_close(out, expected, dtype)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        if wanted.abs().max() > 1e-12:  # a softmax over one key has no gradient
            assert_close(found, wanted, dtype, 2.0)
        else:
            assert found.abs().max() < 1e-2


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("strides", STRIDES[:-1])  # SDPA has flash attention only for a last stride of 1
def test_strides(strides: str, counted: Counted) -> None:
    tensors, grad = problem(19, 19, strides=strides)
    out, gradients = sdpa(tensors, grad, is_causal=True)
    assert counted.both == (1, 1)
    expected, _, expected_gradients = exact(tensors, grad, "first")
    assert_close(out, expected, F32)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(found, wanted, F32, 2.0)


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads: int, counted: Counted) -> None:
    tensors, grad = problem(13, 21, kv_heads=kv_heads)
    out, gradients = sdpa(tensors, grad, enable_gqa=True)
    assert counted.both == (1, 1)
    expected, _, expected_gradients = exact(tensors, grad, None)
    assert_close(out, expected, F32)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(found, wanted, F32, 2.0)


def described(results: Any) -> list[Any]:
    """What the fake kernels promise of a result, strides along a size of 1 aside."""
    return [
        (r.shape, r.dtype, [step for step, size in zip(r.stride(), r.shape, strict=True) if size > 1])
        if isinstance(r, Tensor)
        else r
        for r in results
    ]


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("heads", [1, 4])
def test_cpu_results_lie_as_the_fake_kernels_say(heads: int, strides: str, counted: Counted) -> None:
    query, key, value = (draw(2, heads, rows, 8, BF16, strides) for rows in (5, 7, 7))
    out, lse = CPU_OP(query, key, value)
    gradients = CPU_BACKWARD(draw(2, heads, 5, 8, BF16), query, key, value, out, lse, 0.0, False)
    assert counted.both == (1, 1)
    query, key, value, out_, lse_ = (tensor.to("meta") for tensor in (query, key, value, out, lse))
    fake = [tensor.as_strided(real.shape, real.stride()) for tensor, real in ((out_, out), (lse_, lse))]
    assert described((out, lse)) == described(CPU_OP(query, key, value))
    assert described(gradients) == described(CPU_BACKWARD(query, query, key, value, *fake, 0.0, False))
    assert lse.dtype is F32


@pytest.mark.usefixtures("active")
def test_logsumexp(counted: Counted) -> None:
    tensors, grad = problem(9, 15)
    out, lse = CPU_OP(*tensors, is_causal=True)
    expected, expected_lse, _ = exact(tensors, grad, "first")
    assert counted.forward == 1
    assert_close(out, expected, F32)
    assert_close(lse, expected_lse, F32)


@pytest.mark.parametrize("ours_first", [True, False])
def test_forward_and_backward_may_be_of_two_implementations(ours_first: bool, counted: Counted) -> None:
    """Activation or its end between the two passes."""
    tensors, grad = problem(11, 23)
    query, key, value = leaves = [tensor.requires_grad_() for tensor in tensors]
    flash.register_flash_provider()
    try:
        if ours_first:
            activate_flash_attention_impl(flash.NAME)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        restore_flash_attention_impl() if ours_first else activate_flash_attention_impl(flash.NAME)
        gradients = torch.autograd.grad(out, leaves, grad)
    finally:
        restore_flash_attention_impl(_raise_warn=False)
    assert counted.both == ((1, 0) if ours_first else (0, 1))
    for found, wanted in zip(gradients, exact(tensors, grad, "first")[2], strict=True):
        assert_close(found, wanted, F32, 5.0)


UNSERVED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("float64", {"dtype": F64}, {}, "float64"),
    ("mask", {}, {"attn_mask": torch.zeros(6, 6).index_fill(1, torch.tensor([2]), -1e4)}, "attn_mask is given"),
    ("wide heads", {"head_dim": 264}, {}, "largest head_dim is 256, got 264"),
]


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize(("name", "given", "how", "reason"), UNSERVED, ids=[case[0] for case in UNSERVED])
def test_the_rest_goes_to_pytorch_and_says_why(
    name: str,
    given: dict[str, Any],
    how: dict[str, Any],
    reason: str,
    counted: Counted,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors, grad = problem(6, 6, **given)
    with caplog.at_level(logging.DEBUG, logger=flash.__name__):
        results = sdpa(tensors, grad, **how)
    assert counted.both == (0, 0)
    assert [reason in record.message for record in caplog.records] == [True, True], caplog.text
    restore_flash_attention_impl()
    own = sdpa(tensors, grad, **how)
    assert torch.equal(results[0], own[0])
    assert all(map(torch.equal, results[1], own[1]))


@pytest.mark.usefixtures("active")
def test_bad_input_is_refused_as_ever() -> None:
    query = draw(2, 3, 5, 8)
    with pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
        CPU_OP(query, query, query.double())


@pytest.mark.usefixtures("active")
def test_dropout(counted: Counted) -> None:
    tensors, grad = problem(6, 6)
    out, _ = sdpa(tensors, grad, dropout_p=0.5)  # SDPA's math implementation
    assert counted.both == (0, 0)
    assert (out - exact(tensors, grad, None)[0]).abs().max() > 0.01
    for function in (CPU_OP, SDPA_FORWARD):
        with pytest.raises(NotImplementedError, match=r"dropout_p=0\.5.*segment_attention\(dropout_p=, seed=\)"):
            function(*tensors, 0.5)


@pytest.mark.usefixtures("active")
def test_compiled_checkpointed_inference_autocast(counted: Counted) -> None:
    tensors, grad = problem(12, 12)
    expected, _, expected_gradients = exact(tensors, grad, "first")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def checkpointed(*args: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(attend, *args, use_reentrant=False)

    runs: list[tuple[Callable[..., Any], int]] = [
        (torch.compile(attend, backend="aot_eager", fullgraph=True), 1),
        (checkpointed, 2),
    ]
    for function, forwards in runs:
        before = counted.both
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        gradients = torch.autograd.grad(out, leaves, grad)
        assert (counted.forward - before[0], counted.backward - before[1]) == (forwards, 1)
        assert_close(out.detach(), expected, F32)
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            assert_close(found, wanted, F32, 2.0)

    before = counted.both
    with torch.inference_mode():
        assert_close(attend(*tensors), expected, F32)
    with torch.autocast("cpu", BF16):
        assert_close(attend(*tensors), expected, BF16, 2.0)
    assert counted.forward == before[0] + 2


@pytest.mark.slow
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("strides", ["fused", "heads outside"])
def test_compiled_by_inductor(strides: str, counted: Counted) -> None:
    """Its code relies on the strides that the fake kernels promise."""
    tensors, grad = problem(12, 12, strides=strides)

    @torch.compile(fullgraph=True)
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query * 1.5, key + 0.0, value, is_causal=True).transpose(1, 2) * 2.0

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad.transpose(1, 2))
    assert counted.both == (1, 1)
    query, key, value = tensors
    expected, _, wanted = exact([query * 1.5, key, value], grad * 2.0, "first")
    assert_close(out.detach().transpose(1, 2), expected * 2.0, F32)
    for found, right in zip(gradients, (wanted[0] * 1.5, wanted[1], wanted[2]), strict=True):
        assert_close(found, right, F32, 2.0)


# The CUDA operators' functions, on CPU tensors.

CAUSAL = [(9, 9, None), (9, 21, None), (21, 9, None), (17, 17, "last"), (5, 18, "last")]


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(("queries", "keys", "causal"), CAUSAL)
def test_cuda_sdpa(queries: int, keys: int, causal: str | None, strides: str, counted: Counted) -> None:
    tensors, grad = problem(queries, keys, strides=strides, kv_heads=2)
    is_causal = causal is not None
    results = SDPA_FORWARD(*tensors, 0.0, is_causal, scale=0.3)
    out, lse, *_, seed, offset, _ = results
    backward = (0.0, is_causal, seed, offset)
    gradients = SDPA_BACKWARD(grad, *tensors, out, lse, None, None, queries, keys, *backward, scale=0.3)
    assert counted.both == (1, 1)
    expected, expected_lse, expected_gradients = exact(tensors, grad, causal, 0.3)
    assert_close(out, expected, F32)
    assert_close(lse, expected_lse, F32)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(found, wanted, F32, 2.0)
    metas = [tensor.to("meta") for tensor in tensors]
    assert described(results) == described(torch.ops.aten._scaled_dot_product_flash_attention(*metas, 0.0, is_causal))
    fake = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        metas[0], *metas, metas[0], lse.to("meta"), lse.to("meta"), lse.to("meta"), queries, keys, *backward
    )
    assert described(gradients) == described(fake)


@pytest.mark.parametrize(("queries", "keys", "causal"), CAUSAL)
def test_cuda_flash(queries: int, keys: int, causal: str | None, counted: Counted) -> None:
    """The operators below those: rows before heads, and one that writes into a given output."""
    heads_first, grad = problem(queries, keys, strides="rows outside", kv_heads=2)
    tensors = [tensor.transpose(1, 2) for tensor in heads_first]
    options = (None, None, queries, keys, 0.0, causal is not None)
    results = FLASH_FORWARD(*tensors, *options, False, window_size_left=-1, window_size_right=None)
    out, lse, seed, offset, _ = results
    gradients = FLASH_BACKWARD(grad.transpose(1, 2), *tensors, out, lse, *options, seed, offset)
    assert counted.both == (1, 1)
    expected, expected_lse, expected_gradients = exact(heads_first, grad, causal)
    assert_close(out.transpose(1, 2), expected, F32)
    assert_close(lse, expected_lse, F32)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(found.transpose(1, 2), wanted, F32, 2.0)
    metas = [tensor.to("meta") for tensor in tensors]
    assert described(results) == described(torch.ops.aten._flash_attention_forward(*metas, *options, False))
    fake = torch.ops.aten._flash_attention_backward(
        metas[0], *metas, metas[0], lse.to("meta"), None, None, *options[2:], seed, offset
    )
    assert described(gradients) == described(fake)

    into = torch.full_like(out, float("nan"))
    assert torch.equal(flash._flash_forward_inplace(into, *tensors, *options, False), lse)
    assert torch.equal(into, out)


def test_cuda_operators_refuse() -> None:
    (query, key, value), _ = problem(9, 5)
    with pytest.raises(flash._NotServedError, match="the first rows see nothing"):
        SDPA_FORWARD(query, key, value, 0.0, True)
    with pytest.raises(flash._NotServedError, match="return_debug_mask"):
        SDPA_FORWARD(query, key, value, 0.0, False, True)
    args = (None, None, 9, 5, 0.0, False, False)
    for name, given in {"window_size_left": 4, "alibi_slopes": torch.ones(4), "seqused_k": torch.ones(2)}.items():
        with pytest.raises(flash._NotServedError, match=name):
            FLASH_FORWARD(query, key, value, *args, **{name: given})
    lengths = torch.tensor([0, 9])
    with pytest.raises(flash._NotServedError, match="cum_seq_q"):
        FLASH_FORWARD(query[0], key[0], value[0], lengths, lengths, 9, 9, 0.0, False, False)
    lse = torch.zeros(2, 4, 9)
    with pytest.raises(flash._NotServedError, match="its forward pass had dropout"):
        SDPA_BACKWARD(query, query, key, value, query, lse, None, None, 9, 5, 0.1, False, None, None)
    padded = torch.zeros(2, 4, 128)
    with pytest.raises(flash._NotServedError, match=r"logsumexp is torch.float32 \(2, 4, 128\)"):
        SDPA_BACKWARD(query, query, key, value, query, padded, None, None, 9, 5, 0.0, False, None, None)


def test_without_an_implementation_to_fall_back_on() -> None:
    """A build of PyTorch without CUDA has none for its operators."""
    handle = flash._Active()
    try:
        tensors, _ = problem(9, 5, F64)
        kernel = torch.library.get_kernel("aten::_scaled_dot_product_flash_attention", "CUDA")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        if torch.version.cuda is None:
            with pytest.raises(RuntimeError, match=r"float64.*no implementation of its own for CUDA"):
                kernel.call_boxed(keys, *tensors)
        tensors = [tensor.float() for tensor in tensors]
        out, *rest = kernel.call_boxed(keys, *tensors)  # what the dispatcher makes of the results, None for one too
        assert_close(out, exact(tensors, tensors[0], None)[0], F32)
        assert rest[1:5] == [None, None, 9, 5]
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "missing",
    [
        (attention, "register_flash_attention_impl"),
        (attention, "restore_flash_attention_impl"),
        (torch.library, "get_kernel"),
    ],
    ids=lambda missing: missing[1],
)
def test_a_pytorch_without_the_registry(missing: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(*missing)
    with pytest.raises(RuntimeError, match=rf"PyTorch {torch.__version__[:4]}.*{missing[1]}.*segment_attention"):
        flash.register_flash_provider()
