"""Tiled backend, sequences of one length: values and gradients against the reference."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from attention_cases import TILED, Case, check_fixed, op
from helpers import assert_equals, cu_seqlens, poisoned_empty, randn

from flash_attn_ext.backends import _problem
from flash_attn_ext.reference import attention_reference

OPTIONS = {
    "plain": {},
    "causal": {"window": (-1, 0)},
    "window": {"window": (7, 5)},
    "window_left": {"window": (3, -1)},
    "window_right": {"window": (-1, 9)},
    "causal_window": {"window": (6, 0)},
    "softcap": {"softcap": 2.5},
    "alibi": {"alibi": 1},
    "alibi_per_batch": {"alibi": 2},
    "dropout": {"dropout_p": 0.3},
    "scale": {"softmax_scale": 0.7},
    "everything": {
        "window": (12, 3),
        "softcap": 3.0,
        "alibi": 2,
        "dropout_p": 0.2,
        "softmax_scale": 0.4,
    },
}


@pytest.fixture(params=[None, 1 << 8], ids=["tile_default", "tile_small"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with one tile and with tiles of a few rows and columns."""
    if request.param is not None:
        monkeypatch.setattr(_problem, "_TILE_ELEMENTS", request.param)
        monkeypatch.setattr(_problem, "_MIN_TILE_M", 5)
        monkeypatch.setattr(_problem, "_MIN_TILE_N", 11)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(33, 47), (47, 33), (64, 64)])
def test_fp64_equals_reference(
    options: dict[str, object], seqlen_q: int, seqlen_k: int, device: str
) -> None:
    check_fixed(Case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **options), device, TILED)


@pytest.mark.parametrize("options", [OPTIONS["causal"], OPTIONS["everything"]], ids=["c", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_error_is_at_most_twice_plain_pytorch(
    dtype: torch.dtype, options: dict[str, object], device: str
) -> None:
    check_fixed(
        Case(seqlen_q=130, seqlen_k=150, head_dim=64, dtype=dtype, **options), device, TILED
    )


@pytest.mark.parametrize(("num_heads_q", "num_heads_kv"), [(1, 1), (6, 6), (6, 1), (6, 3)])
def test_head_groups(num_heads_q: int, num_heads_kv: int, device: str) -> None:
    check_fixed(Case(num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, alibi=1), device, TILED)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 1), (13, 7), (256, 8), (8, 256)])
def test_head_dims(head_dim: int, head_dim_v: int, device: str) -> None:
    check_fixed(Case(head_dim=head_dim, head_dim_v=head_dim_v, window=(-1, 0)), device, TILED)


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch_size": 0},
        {"seqlen_q": 0},
        {"seqlen_k": 0},
        {"seqlen_q": 0, "seqlen_k": 0},
        {"seqlen_q": 1},
        {"seqlen_k": 1},
        {"seqlen_q": 1, "seqlen_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, OPTIONS["everything"]], ids=["plain", "all"])
def test_short_sequences(sizes: dict[str, int], options: dict[str, object], device: str) -> None:
    check_fixed(Case(**(sizes | options)), device, TILED)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_lengths_around_the_tile(offset: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_problem, "_MAX_TILE_M", 16)
    monkeypatch.setattr(_problem, "_MAX_TILE_N", 32)
    check_fixed(Case(seqlen_q=32 + offset, seqlen_k=64 + offset, window=(-1, 0)), device, TILED)


def test_rows_without_a_key(device: str) -> None:
    """Of 9 queries the first 5 see none of the 4 keys: out 0, lse -inf, gradients 0."""
    case = Case(seqlen_q=9, seqlen_k=4, window=(-1, 0))
    q, k, v = (x.detach() for x in case.inputs(device))
    out, lse, _ = op("fwd", "tiled")(q, k, v, *case.options(device), False, 0, 0)
    assert (out[:, :5] == 0).all()
    assert (lse[:, :, :5] == -torch.inf).all()
    assert lse[:, :, 5:].isfinite().all()
    dlse = torch.full_like(lse, torch.nan)  # what autograd makes of a loss over -inf
    dlse[:, :, 5:] = 1.0
    dq, dk, dv = op("bwd", "tiled")(
        torch.ones_like(out), q, k, v, out, lse, dlse, *case.options(device), True, 0
    )
    assert (dq[:, :5] == 0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.parametrize("overload", ["default", "tiled"])
def test_defaults_of_the_ops(device: str, overload: str) -> None:
    """What a caller leaves out is a plain call's."""
    assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
    case = Case(seqlen_q=9, seqlen_k=12)
    q, k, v = (x.detach() for x in case.inputs(device))
    scores = (None, None, q.shape[-1] ** -0.5, -1, -1, 0.0, 0.0)
    out, lse, dmask = op("fwd", overload)(q, k, v)
    assert_same((out, lse, dmask), op("fwd", overload)(q, k, v, *scores, False, 0, 0))
    written = torch.empty_like(out)
    assert_same(op("fwd_out", overload)(q, k, v, written), (lse, dmask))
    assert_same(written, out)
    dout = torch.ones_like(out)
    gradients = op("bwd", overload)(dout, q, k, v, out, lse)
    state = (dout, q, k, v, out, lse, None)
    assert_same(gradients, op("bwd", overload)(*state, *scores, False, 0))

    packed = tuple(x.flatten(0, 1) for x in (q, k, v))
    lengths = (cu_seqlens([7, 11], device), cu_seqlens([14, 10], device), None, None)
    results = op("varlen_fwd", overload)(*packed, *lengths, None, 11, 14)
    explicit = op("varlen_fwd", overload)(*packed, *lengths, None, 11, 14, *scores, False, 0, 0)
    assert_same(results, explicit)


def test_nothing_is_visible(device: str) -> None:
    """A window wholly left of the keys."""
    case = Case(seqlen_q=40, seqlen_k=8, window=(-1, 0))
    q, k, v = (x.detach() for x in case.inputs(device))
    q = q[:, :20]
    options = (None, None, 1.0, 0, 0, 0.0, 0.0)
    out, lse, _ = op("fwd", "tiled")(q, k[:, :0], v[:, :0], *options, False, 0, 0)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    dq, dk, dv = op("bwd", "tiled")(out, q, k[:, :0], v[:, :0], out, lse, None, *options, True, 0)
    assert (dq == 0).all()
    assert dk.shape == k[:, :0].shape
    assert dv.shape == v[:, :0].shape


def test_large_scores(device: str) -> None:
    """exp of the scores themselves would overflow."""
    q, k, v = (randn(1, 20, 2, 8, dtype=torch.float32, device=device).detach() for _ in range(3))
    options = (None, None, 1e4, -1, -1, 0.0, 0.0)
    out, lse, _ = op("fwd", "tiled")(q, k, v, *options, False, 0, 0)
    ref = attention_reference(q, k, v, softmax_scale=1e4)
    assert_equals(out, ref.out, 1e-3)
    assert (lse - ref.lse).abs().max() <= 1e-6 * ref.lse.abs().max()


def test_nan_inputs_show(device: str) -> None:
    case = Case(dtype=torch.float32)
    q, k, v = (x.detach() for x in case.inputs(device))
    q[0, 3] = torch.nan
    out, lse, _ = op("fwd", "tiled")(q, k, v, *case.options(device), False, 0, 0)
    assert out[0, 3].isnan().all()
    assert lse[0, :, 3].isnan().all()
    assert out[1].isfinite().all()


def test_any_strides_and_out(device: str) -> None:
    """Heads first, every second row, a slice of a packed tensor; and a result with gaps."""
    case = Case(num_heads_kv=4, head_dim_v=16)
    q, k, v = (x.detach() for x in case.inputs(device))
    expected = op("fwd", "tiled")(q, k, v, *case.options(device), False, 0, 0)
    q_view = q.transpose(1, 2).contiguous().transpose(1, 2)
    k_view = torch.stack([k, k], 2).flatten(1, 2)[:, ::2]
    v_view = torch.cat([v, v, v], -1)[..., 16:32]
    buffer = poisoned_empty((2, 33, 4, 40), q)
    lse, _ = op("fwd_out")(
        q_view, k_view, v_view, buffer[..., 8:24], *case.options(device), False, 0, 0
    )
    assert torch.equal(buffer[..., 8:24], expected[0])
    assert torch.equal(lse, expected[1])
    assert buffer[..., :8].isnan().all()
    assert buffer[..., 24:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_is_deterministic(dtype: torch.dtype, device: str) -> None:
    case = Case(seqlen_q=70, seqlen_k=90, dropout_p=0.1, dtype=dtype)
    q, k, v = (x.detach() for x in case.inputs(device))
    out, lse, _ = op("fwd", "tiled")(q, k, v, *case.options(device), False, 0, 0)
    args = (out, q, k, v, out, lse, None, *case.options(device), True, 0)
    first, second = op("bwd", "tiled")(*args), op("bwd", "tiled")(*args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("options", [{}, OPTIONS["everything"]], ids=["plain", "all"])
def test_dmask(options: dict[str, object], device: str) -> None:
    """Probabilities before dropout, the sign says dropped, zero outside the matrix."""
    case = Case(**options)
    inputs = case.inputs(device)
    reference_options = case.reference_options(device, 33, 47)
    ref = attention_reference(*inputs, **reference_options)
    q, k, v = (x.detach() for x in inputs)
    _, _, dmask = op("fwd", "tiled")(q, k, v, *case.options(device), True, 0, 0)
    assert dmask.shape == (2, 4, 128, 128)
    inside = dmask[:, :, :33, :47]
    assert_equals(inside.abs(), ref.probs, 1e-12)
    kept = reference_options["dropout_mask"]
    assert torch.equal(inside.signbit(), torch.zeros_like(inside) > 0 if kept is None else ~kept)
    assert not dmask[:, :, 33:].count_nonzero()
    assert not dmask[:, :, :, 47:].count_nonzero()
    assert not dmask[:, :, 33:].signbit().any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options: dict[str, object], device: str) -> None:
    """Finite differences of the op itself, through out and lse."""
    case = dataclasses.replace(
        Case(num_heads_q=2, num_heads_kv=1, seqlen_q=5, seqlen_k=6, head_dim=3, head_dim_v=2),
        **options,
    )

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse, _ = op("fwd", "tiled")(q, k, v, *case.options(device), False, 0, 0)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            args = (dout, *ctx.saved_tensors, dlse, *case.options(device))
            return op("bwd", "tiled")(*args, True, 0)

    assert torch.autograd.gradcheck(Attention.apply, case.inputs(device), fast_mode=False)
