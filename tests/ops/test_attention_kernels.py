"""The attention forward on a GPU: every set of kernels against fp64.

The rule is that of attention_cases: at most twice the error of plain PyTorch in the same dtype.
A problem that no kernel takes is an error here, never a test of the tiled backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import Case, How, Packed, check_fixed, check_packed, op
from helpers import (
    NEEDS_GPU_MEMORY,
    assert_close_2x,
    assert_equals,
    max_error,
    poisoned_empty,
    require,
)
from kernel_cases import (
    A100,
    BF16,
    DEVICE,
    DTYPES,
    EVERYTHING,
    FP16,
    HARD,
    HEAD_DIMS,
    LENGTHS,
    OPTIONS,
    PACKED,
    STRIDES,
    case,
    far_apart,
)
from tensor_layouts import LAYOUTS, inside
from torch import Tensor

from flash_attn_ext import UnsupportedError, flash_attn_func, plans
from flash_attn_ext.reference import attention_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

FORWARD = How(backward=False)


def forward(
    problem: Case, inputs: list[Tensor], return_dmask: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and dmask of the op."""
    q, k, v = (x.detach() for x in inputs)
    results: tuple[Tensor, Tensor, Tensor] = op("fwd")(
        q, k, v, *problem.options(DEVICE), return_dmask, 0, 0
    )
    return results


def test_the_plan_is_a_kernel(kernels: str) -> None:
    q = torch.empty(2, 100, 4, 64, dtype=BF16, device=DEVICE)
    for options in ({}, {"causal": True}, {"softcap": 3.0, "dropout_p": 0.1}):
        step = plans.explain(q, q, q, **options).attention
        assert step.backend == plans.KERNEL
        assert kernels == "native" or step.kernel == "sm80_fwd_hdim64_bf16"
        assert (step.tiles == "sm89") == (kernels == "sm80_99kb") or kernels == "native"


def test_what_no_kernel_takes_is_an_error() -> None:
    """The guard of this file: without it the tiled backend could pass all tests."""
    q = torch.empty(2, 10, 4, 64, device=DEVICE)
    with pytest.raises(UnsupportedError, match="no kernel takes these inputs"):
        flash_attn_func(q, q, q)


@DTYPES
@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIMS)
def test_head_dims(head_dim: int, head_dim_v: int, dtype: torch.dtype) -> None:
    for options in ({"window": (-1, 0)}, EVERYTHING):
        problem = case(dtype, head_dim=head_dim, head_dim_v=head_dim_v, **options)
        check_fixed(problem, DEVICE, FORWARD)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths(seqlen_q: int, seqlen_k: int, head_dim: int) -> None:
    for window in ((-1, -1), (-1, 0), (64, 30)):
        sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim}
        problem = case(window=window, head_dim_v=head_dim, **sizes)
        check_fixed(problem, DEVICE, FORWARD)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], head_dim: int, dtype: torch.dtype) -> None:
    sizes = {"seqlen_q": 260, "seqlen_k": 300, "head_dim": head_dim, "head_dim_v": head_dim}
    check_fixed(case(dtype, **sizes, **options), DEVICE, FORWARD)


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tiles_of_an_a100(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in A100.items():
        monkeypatch.setenv(name, value)
    for head_dim in (64, 256):
        sizes = {"seqlen_q": 260, "seqlen_k": 300, "head_dim": head_dim, "head_dim_v": head_dim}
        check_fixed(case(**sizes, **options), DEVICE, FORWARD)


@DTYPES
@pytest.mark.parametrize("options", ["plain", "causal", "alibi", "dropout", "scale_negative"])
def test_lse_is_that_of_fp32(options: str, dtype: torch.dtype) -> None:
    """Twice the error of plain PyTorch is a weak rule for lse, which 16 bits round to percents."""
    problem = case(dtype, head_dim=128, **OPTIONS[options])
    inputs = problem.inputs(DEVICE)
    expected = attention_reference(*inputs, **problem.reference_options(DEVICE, 150, 200)).lse
    assert_equals(forward(problem, inputs)[1], expected, 2e-5, "lse")


@pytest.mark.parametrize(("num_heads_q", "num_heads_kv"), [(1, 1), (6, 6), (6, 2), (8, 1), (7, 7)])
def test_heads(num_heads_q: int, num_heads_kv: int) -> None:
    heads = {"num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "batch_size": 3}
    check_fixed(case(**heads, alibi=2, window=(-1, 0)), DEVICE, FORWARD)


@DTYPES
@pytest.mark.parametrize("options", ["plain", "causal", "window", "everything"])
@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)
def test_packed(packed: Packed, options: str, dtype: torch.dtype) -> None:
    batch_size = len(packed.seqlens_q)
    for head_dim in (64, 128):
        sizes = {"batch_size": batch_size, "head_dim": head_dim, "head_dim_v": head_dim}
        problem = case(dtype, **sizes, **OPTIONS[options])
        check_packed(problem, packed, DEVICE, FORWARD)


@pytest.mark.parametrize("head_dim", [59, 96, 192, 256])
def test_packed_head_dims(head_dim: int) -> None:
    problem = case(batch_size=3, head_dim=head_dim, head_dim_v=head_dim, **EVERYTHING)
    check_packed(problem, PACKED["seqused"], DEVICE, FORWARD)


def test_no_sequences() -> None:
    check_packed(case(batch_size=0), Packed([], [], extra=140), DEVICE, FORWARD)
    check_packed(case(batch_size=0), Packed([], []), DEVICE, FORWARD)


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
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_empty(sizes: dict[str, int], options: str) -> None:
    """Without keys out is 0 and lse -inf, whatever was in memory."""
    problem = case(**sizes, **{**OPTIONS[options], "dropout_p": 0.0})
    inputs = problem.inputs(DEVICE)
    poison = torch.full((1 << 20,), torch.nan, device=DEVICE)  # what out and lse may be given
    del poison
    out, lse, _ = forward(problem, inputs)
    assert out.shape == (*inputs[0].shape[:-1], 64)
    assert lse.shape == (inputs[0].shape[0], inputs[0].shape[2], inputs[0].shape[1])
    assert not out.count_nonzero()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 64), (128, 128), (96, 40), (59, 72)])
def test_strides(head_dim: int, head_dim_v: int, layout: Callable[[Tensor], Tensor]) -> None:
    how = How(layout=layout, backward=False)
    problem = case(head_dim=head_dim, head_dim_v=head_dim_v, window=(-1, 0))
    check_fixed(problem, DEVICE, how)
    check_packed(case(batch_size=3, head_dim=head_dim), PACKED["rows_behind"], DEVICE, how)


def test_strides_of_zero() -> None:
    """One key/value head that is expanded to all."""
    problem = case(num_heads_q=4, num_heads_kv=4)
    q, k, v = problem.inputs(DEVICE)
    k, v = (x.detach()[:, :, :1].expand_as(x).clone().requires_grad_() for x in (k, v))

    def layout(x: Tensor) -> Tensor:
        shared = x[:, :, :1].expand_as(x)
        return shared if torch.equal(shared, x) else x

    check_fixed(problem, DEVICE, How(layout=layout, backward=False), [q, k, v])


@pytest.mark.parametrize("head_dim_v", [64, 59])
@pytest.mark.parametrize("margin", [(0, 0), (8, 8), (3, 1)], ids=["whole", "aligned", "unaligned"])
def test_out_is_written_in_place(margin: tuple[int, int], head_dim_v: int) -> None:
    problem = case(head_dim_v=head_dim_v, **EVERYTHING)
    q, k, v = (x.detach() for x in problem.inputs(DEVICE))
    expected = forward(problem, [q, k, v])
    buffer = poisoned_empty((2, 150, 4, head_dim_v), q)
    out = inside(buffer, (1, 2), (0, 1), margin)
    lse, _ = op("fwd_out")(q, k, v, out, *problem.options(DEVICE), False, 0, 0)
    assert_equals(out, expected[0], 0.0)
    assert_equals(lse, expected[1], 0.0, "lse")
    whole = out._base
    assert whole is not None
    assert whole.isnan().sum().item() == whole.numel() - out.numel()


# ---- scores that are hard for an online softmax -----------------------------------------------


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", ["plain", "causal", "softcap_large", "alibi"])
@pytest.mark.parametrize("scores", HARD)
def test_hard_scores(scores: str, options: str, head_dim: int, dtype: torch.dtype) -> None:
    problem = case(dtype, head_dim=head_dim, seqlen_q=200, seqlen_k=530, **OPTIONS[options])
    inputs = HARD[scores](problem)
    check_fixed(problem, DEVICE, FORWARD, inputs)
    out, lse, _ = forward(
        problem, inputs
    )  # the rule holds for any error if plain PyTorch overflows
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_infinite_scores_of_masked_keys() -> None:
    """Keys behind the diagonal may hold anything finite, also what overflows the score."""
    problem = case(FP16, seqlen_q=200, seqlen_k=200, window=(-1, 0))
    q, k, v = (x.detach() for x in problem.inputs(DEVICE))
    seen = [x[:, :100] for x in (q, k, v)]
    expected = attention_reference(*seen, causal=True)
    plain = attention_reference(*seen, causal=True, upcast=False)
    k[:, 100:] = 60000.0
    v[:, 100:] = 60000.0
    out, lse, _ = forward(problem, [q, k, v])
    assert_close_2x(out[:, :100], expected.out, plain.out)
    assert_close_2x(lse[:, :, :100], expected.lse, plain.lse, name="lse")


# ---- dropout mask, repeatability, large extents, graphs ---------------------------------------


@DTYPES
@pytest.mark.parametrize("options", [{}, {"window": (-1, 0)}, EVERYTHING], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dmask(head_dim: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Probabilities, negative where dropped; zero where there is nothing."""
    problem = case(dtype, head_dim=head_dim, **{**options, "dropout_p": 0.3})
    inputs = problem.inputs(DEVICE)
    reference_options = problem.reference_options(DEVICE, 150, 200)
    expected = attention_reference(*inputs, **reference_options).probs
    plain = attention_reference(*inputs, upcast=False, **reference_options).probs
    _, _, dmask = forward(problem, inputs, return_dmask=True)
    assert dmask.shape == (2, 4, 256, 256)
    assert dmask.dtype == dtype
    found = dmask[:, :, :150, :200]
    assert_close_2x(found.abs(), expected, plain, name="dmask")
    shows = found != 0
    assert torch.equal(found.signbit()[shows], ~reference_options["dropout_mask"][shows])
    assert not dmask[:, :, 150:].count_nonzero()
    assert not dmask[..., 200:].count_nonzero()


def test_dmask_of_packed_sequences() -> None:
    packed = PACKED["ragged"]
    problem = case(batch_size=4, dropout_p=0.3)
    q, k, v = (x.detach() for x in problem.packed_inputs(packed.total_q, packed.total_k, DEVICE))
    _, _, dmask = op("varlen_fwd")(
        q, k, v, *packed.tensors(DEVICE), None, 400, 600, *problem.options(DEVICE), True, 0, 0
    )
    assert dmask.shape == (4, 4, 512, 640)
    kept = problem.reference_options(DEVICE, 400, 600)["dropout_mask"]
    for batch, (rows, cols) in enumerate(zip(packed.seqlens_q, packed.seqlens_k, strict=True)):
        found = dmask[batch, :, :rows, :cols]
        sums = found.double().abs().sum(-1)
        assert max_error(sums, torch.ones_like(sums)) < 0.02
        shows = found != 0
        assert torch.equal(found.signbit()[shows], ~kept[batch, :, :rows, :cols][shows])
        assert not dmask[batch, :, rows:].count_nonzero()
        assert not dmask[batch, :, :, cols:].count_nonzero()


@pytest.mark.parametrize("options", ["plain", "causal", "everything"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_bitwise_repeatable(head_dim: int, options: str) -> None:
    problem = case(
        seqlen_q=700, seqlen_k=900, head_dim=head_dim, head_dim_v=head_dim, **OPTIONS[options]
    )
    inputs = problem.inputs(DEVICE)
    first = forward(problem, inputs)
    for _ in range(1000):
        for a, b in zip(forward(problem, inputs), first, strict=True):
            assert torch.equal(a, b)


def test_rows_do_not_depend_on_the_batch() -> None:
    problem = case(batch_size=5, window=(-1, 0))
    inputs = [x.detach() for x in problem.inputs(DEVICE)]
    out, lse, _ = forward(problem, inputs)
    for batch in range(5):
        alone = forward(problem, [x[batch : batch + 1] for x in inputs])
        assert torch.equal(alone[0][0], out[batch])
        assert torch.equal(alone[1][0], lse[batch])


@pytest.mark.parametrize("stride", STRIDES.values(), ids=STRIDES)
def test_strides_beyond_32_bits(stride: tuple[int, int, int]) -> None:
    require(NEEDS_GPU_MEMORY)
    problem = case(num_heads_q=2, seqlen_q=40, seqlen_k=40, window=(-1, 0))
    inputs = [x.detach() for x in problem.inputs(DEVICE)]
    expected = forward(problem, inputs)
    q, k, v, out = far_apart(stride, *inputs, torch.full_like(inputs[0], torch.nan))
    lse, _ = op("fwd_out")(q, k, v, out, *problem.options(DEVICE), False, 0, 0)
    assert_equals(out, expected[0], 0.0)
    assert_equals(lse, expected[1], 0.0, "lse")


@pytest.mark.parametrize("varlen", [False, True], ids=["fixed", "varlen"])
def test_more_than_2_31_elements(varlen: bool) -> None:
    """q and out of 2^31 elements and a little more; the last rows are compared."""
    require(NEEDS_GPU_MEMORY)
    seqlen, num_heads = 2**18 + 5, 128
    q = torch.empty(1, seqlen, num_heads, 64, dtype=BF16, device=DEVICE).normal_()
    k, v = (torch.randn(1, 30, 1, 64, device=DEVICE).to(BF16) for _ in range(2))
    options = (None, None, 0.125, -1, -1, 0.0, 0.0, False, 0, 0)
    if varlen:
        ends = [torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (seqlen, 30)]
        out, lse, _ = op("varlen_fwd")(
            q[0], k[0], v[0], *ends, None, None, None, seqlen, 30, *options
        )
        out, lse = out[None], lse[None]
    else:
        out, lse, _ = op("fwd")(q, k, v, *options)
    for rows in (slice(0, 100), slice(-100, None)):
        expected = attention_reference(q[:, rows], k, v)
        plain = attention_reference(q[:, rows], k, v, upcast=False)
        assert_close_2x(out[:, rows], expected.out, plain.out)
        assert_close_2x(lse[:, :, rows], expected.lse, plain.lse, name="lse")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_million_tokens(head_dim: int) -> None:
    """One causal sequence of two query heads on one KV head; its first and last rows."""
    require(NEEDS_GPU_MEMORY)
    seqlen = 1_000_000
    q = torch.randn(1, seqlen, 2, head_dim, device=DEVICE).to(BF16)
    k, v = (torch.randn(1, seqlen, 1, head_dim, device=DEVICE).to(BF16) for _ in range(2))
    scores = (None, None, head_dim**-0.5, -1, 0, 0.0, 0.0)
    out, lse, _ = op("fwd")(q, k, v, *scores, False, 0, 0)
    for first, last in ((0, 130), (seqlen - 8, seqlen)):
        keys = slice(0, last)  # bottom-right: row last - 1 sees all of them
        inputs = q[:, first:last], k[:, keys], v[:, keys]
        expected = attention_reference(*inputs, causal=True)
        plain = attention_reference(*inputs, causal=True, upcast=False)
        assert_close_2x(out[:, first:last], expected.out, plain.out)
        assert_close_2x(lse[:, :, first:last], expected.lse, plain.lse, name="lse")


def _calls() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forward calls of every kind, each a function of nothing."""
    fixed = case(**EVERYTHING)
    odd = case(head_dim=59, head_dim_v=59)
    packed = PACKED["seqused"]
    sequences = case(batch_size=3, **EVERYTHING)
    q, k, v = (x.detach() for x in sequences.packed_inputs(packed.total_q, packed.total_k, DEVICE))
    lengths, options = packed.tensors(DEVICE), sequences.options(DEVICE)
    fixed_inputs, odd_inputs = fixed.inputs(DEVICE), odd.inputs(DEVICE)
    fixed_options, odd_options = fixed.options(DEVICE), odd.options(DEVICE)

    def call(inputs: list[Tensor], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = op("fwd")(*inputs, *options, True, 0, 0)
        return results

    return {
        "fixed": lambda: call([x.detach() for x in fixed_inputs], fixed_options),
        "copied": lambda: call([x.detach() for x in odd_inputs], odd_options),
        "packed": lambda: op("varlen_fwd")(
            q, k, v, *lengths, None, *packed.max_seqlens, *options, True, 0, 0
        ),
    }


@pytest.mark.parametrize("kind", ["fixed", "copied", "packed"])
def test_no_synchronisation(kind: str) -> None:
    call = _calls()[kind]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["fixed", "copied", "packed"])
def test_cuda_graph(kind: str) -> None:
    call = _calls()[kind]
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert_equals(a, b, 0.0)
