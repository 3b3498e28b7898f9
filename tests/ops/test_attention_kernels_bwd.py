"""The attention backward on a GPU: gradients of every set of kernels against fp64.

The rule and the problems are those of test_attention_kernels.py. A problem that no kernel takes is
an error here, never a test of the tiled backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import Case, How, Packed, check_fixed, check_packed, compare, gradients, op
from helpers import NEEDS_GPU_MEMORY, assert_equals, require
from kernel_cases import (
    A100,
    BF16,
    DEVICE,
    DTYPES,
    EVERYTHING,
    HARD,
    HEAD_DIMS,
    LENGTHS,
    OPTIONS,
    PACKED,
    STRIDES,
    case,
    far_apart,
)
from tensor_layouts import LAYOUTS
from torch import Tensor

from flash_attn_ext import flash_attn_func, flash_attn_varlen_func, plans
from flash_attn_ext.reference import attention_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

BOTH = pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])


def backward(
    problem: Case, inputs: list[Tensor], deterministic: bool = True
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """A function that computes dq, dk and dv of random dout and dlse, always of the same ones."""
    q, k, v = (x.detach() for x in inputs)
    options = problem.options(DEVICE)
    out, lse, _ = op("fwd")(q, k, v, *options, False, 0, 0)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    arguments = (dout, q, k, v, out, lse, dlse, *options, deterministic, 0)
    return lambda: op("bwd")(*arguments)


def packed_backward(
    problem: Case, packed: Packed, deterministic: bool = True
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """The same for packed sequences."""
    q, k, v = (x.detach() for x in problem.packed_inputs(packed.total_q, packed.total_k, DEVICE))
    lengths, sizes, options = packed.tensors(DEVICE), packed.max_seqlens, problem.options(DEVICE)
    out, lse, _ = op("varlen_fwd")(q, k, v, *lengths, None, *sizes, *options, False, 0, 0)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    arguments = (dout, q, k, v, out, lse, dlse, *lengths, *sizes, *options, deterministic, 0)
    return lambda: op("varlen_bwd")(*arguments)


def test_the_plan_is_a_kernel(kernels: str) -> None:
    q = torch.empty(2, 100, 4, 64, dtype=BF16, device=DEVICE, requires_grad=True)
    for options in ({}, {"causal": True, "deterministic": True}, {"softcap": 3.0}):
        _, preprocess, step = plans.explain(q, q, q, **options).steps
        assert preprocess.backend == step.backend == plans.KERNEL
        assert kernels == "native" or step.kernel == "sm80_bwd_hdim64_bf16"
        assert (step.tiles == "sm89") == (kernels == "sm80_99kb") or kernels == "native"


@DTYPES
@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIMS)
def test_head_dims(head_dim: int, head_dim_v: int, dtype: torch.dtype) -> None:
    for options in ({"window": (-1, 0)}, EVERYTHING):
        problem = case(dtype, head_dim=head_dim, head_dim_v=head_dim_v, **options)
        check_fixed(problem, DEVICE)


@BOTH
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths(seqlen_q: int, seqlen_k: int, head_dim: int, deterministic: bool) -> None:
    for window in ((-1, -1), (-1, 0), (64, 30)):
        sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim}
        problem = case(window=window, head_dim_v=head_dim, **sizes)
        check_fixed(problem, DEVICE, How(deterministic=deterministic))


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], head_dim: int, dtype: torch.dtype) -> None:
    sizes = {"seqlen_q": 260, "seqlen_k": 300, "head_dim": head_dim, "head_dim_v": head_dim}
    check_fixed(case(dtype, **sizes, **options), DEVICE, How(deterministic=head_dim != 128))


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("options", ["causal", "everything"])
def test_tiles_of_an_a100(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in A100.items():
        monkeypatch.setenv(name, value)
    for head_dim in (64, 96, 128, 192, 256):
        sizes = {"seqlen_q": 260, "seqlen_k": 300, "head_dim": head_dim, "head_dim_v": head_dim}
        check_fixed(case(**sizes, **OPTIONS[options]), DEVICE)


@BOTH
@pytest.mark.parametrize(("num_heads_q", "num_heads_kv"), [(1, 1), (6, 6), (6, 2), (8, 1), (7, 7)])
def test_heads(num_heads_q: int, num_heads_kv: int, deterministic: bool) -> None:
    heads = {"num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "batch_size": 3}
    problem = case(**heads, alibi=2, window=(-1, 0))
    check_fixed(problem, DEVICE, How(deterministic=deterministic))


@BOTH
@pytest.mark.parametrize("head_dim", [64, 128])
def test_grouped_heads_that_fill_the_gpu(head_dim: int, deterministic: bool) -> None:
    """With enough tiles of keys one CTA adds up all query heads of a KV head, else several do."""
    heads = {"num_heads_q": 16, "num_heads_kv": 8, "batch_size": 70}
    problem = case(**heads, seqlen_q=70, seqlen_k=257, head_dim=head_dim, head_dim_v=head_dim)
    check_fixed(problem, DEVICE, How(deterministic=deterministic))


@BOTH
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", ["plain", "causal", "window", "everything"])
def test_shared_heads(options: str, head_dim: int, deterministic: bool) -> None:
    """So few tiles of keys, for so many queries, that CTAs share the query heads of a KV head."""
    sizes = {"seqlen_q": 330, "head_dim": head_dim, "head_dim_v": head_dim}
    how = How(deterministic=deterministic)
    for heads, seqlen_k in (((8, 1), 400), ((12, 2), 100)):
        problem = case(
            num_heads_q=heads[0],
            num_heads_kv=heads[1],
            seqlen_k=seqlen_k,
            **sizes,
            **OPTIONS[options],
        )
        q, k, _ = (x.detach().requires_grad_() for x in problem.inputs(DEVICE))
        step = plans.explain(q, k, k, causal=True, deterministic=deterministic).steps[-1]
        assert step.head_splits == heads[0] // heads[1]
        check_fixed(problem, DEVICE, how)


@BOTH
@pytest.mark.parametrize("packed", ["ragged", "rows_behind", "seqused", "one_tile_of_keys"])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_shared_heads_packed(head_dim: int, packed: str, deterministic: bool) -> None:
    lengths = PACKED[packed]
    sizes = {"head_dim": head_dim, "head_dim_v": head_dim, "num_heads_q": 16, "num_heads_kv": 2}
    for options in ("plain", "everything"):
        problem = case(batch_size=len(lengths.seqlens_q), **sizes, **OPTIONS[options])
        check_packed(problem, lengths, DEVICE, How(deterministic=deterministic))


@BOTH
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", ["plain", "causal", "window", "everything"])
def test_few_keys(options: str, head_dim: int, deterministic: bool) -> None:
    """A tile has all keys, so dQ need not be added up; some queries see none."""
    sizes = {"head_dim": head_dim, "head_dim_v": head_dim, "num_heads_q": 6, "num_heads_kv": 2}
    for seqlen_q, seqlen_k in ((300, 30), (40, 64), (200, 128)):
        problem = case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **sizes, **OPTIONS[options])
        check_fixed(problem, DEVICE, How(deterministic=deterministic))


@DTYPES
@pytest.mark.parametrize("options", ["plain", "causal", "window", "everything"])
@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)
def test_packed(packed: Packed, options: str, dtype: torch.dtype) -> None:
    batch_size = len(packed.seqlens_q)
    for head_dim, deterministic in ((64, True), (64, False), (128, True)):
        sizes = {"batch_size": batch_size, "head_dim": head_dim, "head_dim_v": head_dim}
        problem = case(dtype, **sizes, **OPTIONS[options])
        check_packed(problem, packed, DEVICE, How(deterministic=deterministic))


@pytest.mark.parametrize("head_dim", [59, 96, 192, 256])
def test_packed_head_dims(head_dim: int) -> None:
    problem = case(batch_size=3, head_dim=head_dim, head_dim_v=head_dim, **EVERYTHING)
    check_packed(problem, PACKED["seqused"], DEVICE)


@BOTH
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(192, 128), (168, 80)])
@pytest.mark.parametrize("options", ["plain", "causal", "window"])
def test_narrow_values(options: str, head_dim: int, head_dim_v: int, deterministic: bool) -> None:
    sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, **OPTIONS[options]}
    how = How(deterministic=deterministic)
    check_fixed(case(seqlen_q=330, seqlen_k=400, **sizes), DEVICE, how)
    check_packed(case(batch_size=4, **sizes), PACKED["ragged"], DEVICE, how)
    check_packed(case(batch_size=3, **sizes), PACKED["seqused"], DEVICE, how)


def test_no_sequences() -> None:
    check_packed(case(batch_size=0), Packed([], [], extra=140), DEVICE)
    check_packed(case(batch_size=0), Packed([], []), DEVICE)


@pytest.mark.parametrize(
    "sizes",
    [
        {"seqlen_k": 0},
        {"seqlen_q": 0},
        {"batch_size": 0},
        {"num_heads_q": 0, "num_heads_kv": 0},
        {"seqlen_q": 0, "seqlen_k": 0},
    ],
    ids=str,
)
def test_empty(sizes: dict[str, int]) -> None:
    problem = case(**sizes)
    inputs = problem.inputs(DEVICE)
    for gradient, x in zip(backward(problem, inputs)(), inputs, strict=True):
        assert gradient.shape == x.shape
        assert not gradient.count_nonzero()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 64), (128, 128), (96, 40), (59, 72)])
def test_strides(head_dim: int, head_dim_v: int, layout: Callable[[Tensor], Tensor]) -> None:
    how = How(layout=layout)
    problem = case(head_dim=head_dim, head_dim_v=head_dim_v, window=(-1, 0))
    check_fixed(problem, DEVICE, how)
    check_packed(case(batch_size=3, head_dim=head_dim), PACKED["rows_behind"], DEVICE, how)


def test_gradient_of_a_sum() -> None:
    """dout of `out.sum()` is one element, expanded with strides of 0."""
    problem = case(window=(-1, 0))
    inputs = problem.inputs(DEVICE)
    out = flash_attn_func(*inputs, causal=True)
    found = torch.autograd.grad(out.sum(), inputs)
    expected, plain = (
        torch.autograd.grad(
            attention_reference(*inputs, causal=True, upcast=upcast).out.sum(),
            inputs,
        )
        for upcast in (True, False)
    )
    compare_gradients(problem, found, expected, plain)


def compare_gradients(problem: Case, *gradient_lists: tuple[Tensor, ...]) -> None:
    """`compare` of dq, dk and dv alone; their place behind out and lse is filled with nothing."""
    nothing = [torch.zeros(1, device=DEVICE)] * 2
    compare(problem, *([*nothing, *of] for of in gradient_lists))


@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out_and_lse"])
@pytest.mark.parametrize("num_heads_q", [4, 8])
def test_gradient_of_lse(with_dlse: bool, num_heads_q: int) -> None:
    problem = case(num_heads_q=num_heads_q, num_heads_kv=4, window=(90, 0))
    check_fixed(problem, DEVICE, How(with_dlse=with_dlse))
    packed = case(batch_size=4, num_heads_q=num_heads_q, num_heads_kv=4)
    check_packed(packed, PACKED["ragged"], DEVICE, How(with_dlse=with_dlse))


def test_gradient_of_lse_alone() -> None:
    problem = case(window=(-1, 0))
    inputs = problem.inputs(DEVICE)
    _, lse = flash_attn_func(*inputs, causal=True, return_softmax_lse=True)
    weight = torch.randn_like(lse)
    found = torch.autograd.grad((lse * weight).sum(), inputs[:2])
    expected, plain = (
        torch.autograd.grad(
            (attention_reference(*inputs, causal=True, upcast=upcast).lse * weight).sum(),
            inputs[:2],
        )
        for upcast in (True, False)
    )
    zero = (torch.zeros(1, device=DEVICE),)
    compare_gradients(problem, found + zero, expected + zero, plain + zero)


@DTYPES
@pytest.mark.parametrize("options", ["plain", "causal", "softcap_large", "alibi"])
@pytest.mark.parametrize("scores", HARD)
def test_hard_scores(scores: str, options: str, dtype: torch.dtype) -> None:
    problem = case(dtype, seqlen_q=200, seqlen_k=530, **OPTIONS[options])
    inputs = HARD[scores](problem)
    # An outlier in v makes delta large, which is summed up from the rounded out.
    check_fixed(problem, DEVICE, How(like_tiled="outliers" in scores), inputs)
    if dtype == BF16 or "outliers" not in scores:  # those are beyond the range of fp16
        assert all(x.isfinite().all() for x in backward(problem, inputs)())


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_deterministic(head_dim: int, options: str) -> None:
    """The same bits in 200 runs, with shared key/value heads and many blocks of keys."""
    sizes = {"num_heads_q": 6, "num_heads_kv": 2, "seqlen_q": 700, "seqlen_k": 900}
    problem = case(head_dim=head_dim, head_dim_v=head_dim, **sizes, **OPTIONS[options])
    call = backward(problem, problem.inputs(DEVICE))
    first = call()
    for _ in range(200):
        for a, b in zip(call(), first, strict=True):
            assert torch.equal(a, b)


def test_deterministic_packed() -> None:
    problem = case(batch_size=4, head_dim=128, head_dim_v=128, **EVERYTHING)
    call = packed_backward(problem, PACKED["ragged"])
    first = call()
    for _ in range(200):
        for a, b in zip(call(), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_dk_and_dv_repeat_without_shared_heads(head_dim: int) -> None:
    """Without grouped heads only dq is added up in any order."""
    heads = {"num_heads_q": 4, "num_heads_kv": 4, "head_dim": head_dim, "head_dim_v": head_dim}
    problem = case(seqlen_q=700, seqlen_k=900, **heads)
    call = backward(problem, problem.inputs(DEVICE), deterministic=False)
    first = call()
    for _ in range(200):
        for a, b in zip(call()[1:], first[1:], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_small_sequences_repeat(head_dim: int, deterministic: bool) -> None:
    """CTAs that start and end all the time, 1,000 times: a race shows as other bits."""
    heads = {"num_heads_q": 4, "num_heads_kv": 4, "head_dim": head_dim, "head_dim_v": head_dim}
    problem = case(batch_size=100, seqlen_q=70, seqlen_k=130, window=(-1, 0), **heads)
    call = backward(problem, problem.inputs(DEVICE), deterministic=deterministic)
    first = call()
    for _ in range(1000):
        dq, *others = call()
        assert torch.equal(dq, first[0]) if deterministic else dq.isfinite().all()
        for a, b in zip(others, first[1:], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("stride", STRIDES.values(), ids=STRIDES)
def test_strides_beyond_32_bits(stride: tuple[int, int, int]) -> None:
    require(NEEDS_GPU_MEMORY)
    problem = case(num_heads_q=2, seqlen_q=40, seqlen_k=40, window=(-1, 0))
    inputs = [x.detach() for x in problem.inputs(DEVICE)]
    options = problem.options(DEVICE)
    out, lse, _ = op("fwd")(*inputs, *options, False, 0, 0)
    dout = torch.randn_like(out)
    expected = op("bwd")(dout, *inputs, out, lse, None, *options, True, 0)
    dout, q, k, v, out = far_apart(stride, dout, *inputs, out)
    found = op("bwd")(dout, q, k, v, out, lse, None, *options, True, 0)
    for a, b in zip(found, expected, strict=True):
        assert_equals(a, b, 0.0)


def test_more_than_2_31_elements_of_workspace() -> None:
    """dq_accum has 2^31 elements and a little more (8.6 GB); the last rows are compared."""
    require(NEEDS_GPU_MEMORY)
    seqlen, num_heads = 2**18 + 5, 128
    q = torch.empty(1, seqlen, num_heads, 64, dtype=BF16, device=DEVICE).normal_()
    k, v = (torch.randn(1, 130, num_heads, 64, device=DEVICE).to(BF16) for _ in range(2))
    options = (None, None, 0.125, -1, -1, 0.0, 0.0)
    out, lse, _ = op("fwd")(q, k, v, *options, False, 0, 0)
    dq, _, _ = op("bwd")(q, q, k, v, out, lse, None, *options, False, 0)  # dout = q
    for rows in (slice(0, 100), slice(-100, None)):
        part = q[:, rows].detach().clone().requires_grad_()
        results = []
        for upcast in (True, False):
            ref = attention_reference(part, k, v, upcast=upcast).out
            results.append(torch.autograd.grad(ref, part, part.detach().to(ref.dtype))[0])
        nothing = (torch.zeros(1, device=DEVICE),) * 2
        compare_gradients(case(), *((x, *nothing) for x in (dq[:, rows], *results)))


CALLS: dict[str, Callable[[bool], Callable[[], tuple[Tensor, Tensor, Tensor]]]] = {
    "fixed": lambda deterministic: backward(
        case(**EVERYTHING), case(**EVERYTHING).inputs(DEVICE), deterministic
    ),
    "copied": lambda deterministic: backward(
        case(head_dim=59, head_dim_v=59), case(head_dim=59, head_dim_v=59).inputs(DEVICE),
        deterministic,
    ),
    "packed": lambda deterministic: packed_backward(
        case(batch_size=3, **EVERYTHING), PACKED["seqused"], deterministic
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("prepare", CALLS.values(), ids=CALLS)
def test_no_synchronisation(
    prepare: Callable[[bool], Callable[[], object]], deterministic: bool
) -> None:
    call = prepare(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("prepare", CALLS.values(), ids=CALLS)
def test_cuda_graph(
    prepare: Callable[[bool], Callable[[], tuple[Tensor, Tensor, Tensor]]],
) -> None:
    """Replayed twice: the workspace is cleared inside the graph."""
    call = prepare(True)
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        for a, b in zip(captured, expected, strict=True):
            assert_equals(a, b, 0.0)


def test_training_step_in_a_graph() -> None:
    """Forward and backward through autograd, captured once, replayed with other values."""
    problem = case(window=(-1, 0), dropout_p=0.0)
    inputs = problem.inputs(DEVICE)
    dout = torch.randn(2, 150, 4, 64, device=DEVICE).to(BF16)

    def step() -> tuple[Tensor, ...]:
        out = flash_attn_func(*inputs, causal=True, deterministic=True)
        return out.detach(), *torch.autograd.grad(out, inputs, dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert_equals(a, b, 0.0)


def test_public_functions() -> None:
    """Through autograd: fixed and packed, grouped heads, sinks, every option of training."""
    problem = case(batch_size=2, seqlen_q=200, seqlen_k=200, window=(-1, 0))
    inputs = problem.inputs(DEVICE)
    references = []
    for upcast in (True, False):
        ref = attention_reference(*inputs, causal=True, upcast=upcast)
        if upcast:
            dout, dlse = torch.randn_like(ref.out).to(BF16), torch.randn_like(ref.lse)
        grads = gradients(ref.out, ref.lse, dout, dlse, inputs)
        references.append([ref.out, ref.lse, *grads])
    out, lse = flash_attn_func(*inputs, causal=True, return_softmax_lse=True)
    compare(problem, [out, lse, *gradients(out, lse, dout, dlse, inputs)], *references)

    ends = torch.tensor([0, 200, 400], dtype=torch.int32, device=DEVICE)
    packed = [x.flatten(0, 1) for x in inputs]
    out, lse = flash_attn_varlen_func(
        *packed, ends, ends, 200, 200, causal=True, return_softmax_lse=True
    )
    out, lse = out.unflatten(0, (2, 200)), lse.unflatten(1, (2, 200)).transpose(0, 1)
    compare(problem, [out, lse, *gradients(out, lse, dout, dlse, inputs)], *references)
