"""SDPA on these kernels: torch's own SDPA is the oracle, its frontends are the callers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention as torch_attention
import torch.nn.functional as F
from helpers import (
    NEEDS_CUDA,
    NEEDS_CXX,
    NEEDS_LIBRARY,
    NEEDS_TORCH_2_11,
    assert_close_2x,
    assert_equals,
    cu_seqlens,
    int32,
    max_error,
    randn,
    require,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from flash_attn_ext import UnsupportedError
from flash_attn_ext.integrations import _sdpa_ops, sdpa

ATEN = torch.ops.aten
OPS = ("_fwd_out", "_bwd", "_varlen_fwd_out", "_varlen_bwd")
HALF = {"cpu": torch.float32, "cuda": torch.bfloat16}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    require(NEEDS_TORCH_2_11)
    yield
    sdpa.restore()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our ops in the order in which the hook calls them."""
    made: list[str] = []

    def counted(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            made.append(name)
            return op(*args)

        return call

    for name in OPS:
        monkeypatch.setattr(_sdpa_ops, name, counted(name, getattr(_sdpa_ops, name)))
    return made


def activate(device: str) -> None:
    if device == "cuda":
        require(NEEDS_LIBRARY)
    sdpa.activate(devices=(device,))


def inputs(
    device: str,
    seqlen_q: int = 33,
    seqlen_k: int = 33,
    heads: tuple[int, int] = (4, 4),
    head_dim: int = 32,
    layout: str = "bshd",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves [2, heads, seqlen, head_dim]; "bshd" and "packed" name what memory looks like."""
    shapes = [(seqlen_q, heads[0]), (seqlen_k, heads[1]), (seqlen_k, heads[1])]
    if layout == "packed":
        qkv = randn(2, seqlen_q, 3, heads[0], head_dim, dtype=dtype or HALF[device], device=device)
        return tuple(x.transpose(1, 2).detach().requires_grad_() for x in qkv.unbind(2))
    tensors = []
    for seqlen, num_heads in shapes:
        sizes = (2, seqlen, num_heads, head_dim)
        if layout == "bhsd":
            sizes = (2, num_heads, seqlen, head_dim)
        x = randn(*sizes, dtype=dtype or HALF[device], device=device).detach()
        tensors.append((x if layout == "bhsd" else x.transpose(1, 2)).requires_grad_())
    return tuple(tensors)


def with_gradients(out: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    weight = torch.linspace(-1.0, 1.0, out.numel(), device=out.device).view_as(out)
    return [out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)]


def by_math(leaves: tuple[Tensor, ...], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Torch's SDPA from plain operations, in another dtype."""
    leaves = tuple(x.detach().to(dtype).requires_grad_() for x in leaves)
    with sdpa_kernel(SDPBackend.MATH):
        return with_gradients(F.scaled_dot_product_attention(*leaves, **options), leaves)


def by_default(leaves: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Torch's SDPA before it is replaced; on a GPU its flash kernel if that takes the call."""
    if leaves[0].is_cuda:
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        with sdpa_kernel(backends, set_priority=True):
            return with_gradients(F.scaled_dot_product_attention(*leaves, **options), leaves)
    return with_gradients(F.scaled_dot_product_attention(*leaves, **options), leaves)


def assert_close(results: list[Tensor], exact: list[Tensor], *yardsticks: list[Tensor]) -> None:
    """At most twice the error of a yardstick: plain operations, or the kernel that was replaced.

    Flash kernels have in common that they sum delta up from the rounded output, which plain
    operations do not.
    """
    for name, x, y, *plain in zip(
        ("out", "dq", "dk", "dv"), results, exact, *yardsticks, strict=True
    ):
        kept = ~y.isnan()  # rows without a key: 0 here, NaN from plain operations
        worst = max(plain, key=lambda z, y=y, kept=kept: max_error(z[kept], y[kept]))
        assert_close_2x(x[kept], y[kept], worst[kept], name=name)
        if name == "out":
            assert (x[~kept] == 0).all()


def assert_as_torch(
    results: list[Tensor], leaves: tuple[Tensor, ...], default: list[Tensor], **options: Any
) -> None:
    exact = by_math(leaves, torch.float64, **options)
    assert_close(results, exact, by_math(leaves, leaves[0].dtype, **options), default)


# ---- torch.nn.functional.scaled_dot_product_attention ------------------------------------------


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "packed"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_forward_and_backward(layout: str, is_causal: bool, device: str, calls: list[str]) -> None:
    leaves = inputs(device, layout=layout)
    default = by_default(leaves, is_causal=is_causal)
    activate(device)
    out = F.scaled_dot_product_attention(*leaves, is_causal=is_causal)
    results = with_gradients(out, leaves)
    assert calls == ["_fwd_out", "_bwd"]
    assert out.stride() == torch.empty_like(leaves[0]).stride()
    assert_as_torch(results, leaves, default, is_causal=is_causal)


@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_grouped_heads_and_scale(head_dim: int, device: str, calls: list[str]) -> None:
    leaves = inputs(device, 20, 37, heads=(6, 2), head_dim=head_dim)
    options = {"enable_gqa": True, "scale": 0.2}
    default = by_default(leaves, **options)
    activate(device)
    results = with_gradients(F.scaled_dot_product_attention(*leaves, **options), leaves)
    assert calls == ["_fwd_out", "_bwd"]
    assert_as_torch(results, leaves, default, **options)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 17), (17, 5), (1, 9)])
def test_causal_is_aligned_to_the_top_left(seqlen_q: int, seqlen_k: int, device: str) -> None:
    """Not as flash-attn does it: a rectangular causal call keeps torch's meaning."""
    leaves = inputs(device, seqlen_q, seqlen_k)
    default = by_default(leaves, is_causal=True)
    activate(device)
    results = with_gradients(F.scaled_dot_product_attention(*leaves, is_causal=True), leaves)
    assert_as_torch(results, leaves, default, is_causal=True)


def test_mask_goes_to_torch(device: str, calls: list[str]) -> None:
    leaves = inputs(device)
    mask = torch.rand(33, 33, device=device) < 0.7
    before = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    default = by_default(leaves, attn_mask=mask)
    activate(device)
    results = with_gradients(F.scaled_dot_product_attention(*leaves, attn_mask=mask), leaves)
    assert calls == []
    assert torch.equal(results[0], before)
    assert_as_torch(results, leaves, default, attn_mask=mask)


def test_what_is_not_served_goes_to_torchs_kernel(device: str, calls: list[str]) -> None:
    """A head dimension past ours on the CPU; fp32 on a GPU."""
    leaves = inputs(device, head_dim=320 if device == "cpu" else 32, dtype=torch.float32)
    before = with_gradients(F.scaled_dot_product_attention(*leaves), leaves)
    activate(device)
    after = with_gradients(F.scaled_dot_product_attention(*leaves), leaves)
    assert calls == []
    for x, y in zip(after, before, strict=True):
        assert torch.equal(x, y)


def test_original_kernel_is_reached_through_the_hook(device: str, calls: list[str]) -> None:
    """Backward under torch's kernel of a forward under ours, and the other way round."""
    leaves = inputs(device)
    default = by_default(leaves, is_causal=True)
    activate(device)
    out = F.scaled_dot_product_attention(*leaves, is_causal=True)
    sdpa.restore()
    results = with_gradients(out, leaves)
    assert calls == ["_fwd_out"]
    assert_as_torch(results, leaves, default, is_causal=True)
    if device == "cuda":
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
    else:
        out = F.scaled_dot_product_attention(*leaves, is_causal=True)
    activate(device)
    results = with_gradients(out, leaves)
    assert calls == ["_fwd_out", "_bwd"]
    assert_as_torch(results, leaves, default, is_causal=True)


def test_compiled(device: str, calls: list[str]) -> None:
    require(NEEDS_CXX)
    torch._dynamo.reset()
    attention = torch.compile(F.scaled_dot_product_attention, fullgraph=True)
    for layout in ("bshd", "bhsd"):
        leaves = inputs(device, layout=layout)
        default = by_default(leaves, is_causal=True)
        activate(device)
        results = with_gradients(attention(*leaves, is_causal=True), leaves)
        assert calls == ["_fwd_out", "_bwd"]
        calls.clear()
        sdpa.restore()
        assert_as_torch(results, leaves, default, is_causal=True)


def test_a_module_of_torch(device: str, calls: list[str]) -> None:
    """One line for a model that was written without us."""
    layer = torch.nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, batch_first=True, device=device, dtype=HALF[device]
    )
    x = randn(2, 19, 32, device=device, dtype=HALF[device])
    plain = with_gradients(layer(x), (x,))
    activate(device)
    ours = with_gradients(layer(x), (x,))
    assert calls == ["_fwd_out", "_bwd"]
    exact = with_gradients(layer.double()(x.double()), (x,))
    for three in zip(ours, exact, plain, strict=True):
        assert_close_2x(*three)


# ---- the ops themselves -----------------------------------------------------------------------


def bottom_right(leaves: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    seqlen_q, seqlen_k = leaves[0].shape[2], leaves[1].shape[2]
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=leaves[0].device)
    return by_math(leaves, dtype, attn_mask=mask.tril(seqlen_k - seqlen_q))


def test_ops_are_aligned_to_the_bottom_right(device: str, calls: list[str]) -> None:
    """As torch's kernel behind the same ops; ``causal_lower_right`` is built on it."""
    leaves = inputs(device, 5, 17)
    yardsticks = [bottom_right(leaves, HALF[device])]
    if device == "cuda":
        out = ATEN._scaled_dot_product_flash_attention(*leaves, 0.0, True)[0]
        yardsticks.append(with_gradients(out, leaves))
    activate(device)
    out = ATEN._scaled_dot_product_flash_attention(*leaves, 0.0, True)[0]
    results = with_gradients(out, leaves)
    assert calls == ["_fwd_out", "_bwd"]
    assert_close(results, bottom_right(leaves, torch.float64), *yardsticks)


def test_causal_lower_right(calls: list[str]) -> None:
    require(NEEDS_CUDA)
    leaves = inputs("cuda", 5, 17)
    bias = causal_lower_right(5, 17)
    default = by_default(leaves, attn_mask=bias)
    activate("cuda")
    results = with_gradients(F.scaled_dot_product_attention(*leaves, attn_mask=bias), leaves)
    assert calls == ["_fwd_out", "_bwd"]
    plain = bottom_right(leaves, HALF["cuda"])
    assert_close(results, bottom_right(leaves, torch.float64), plain, default)


def test_log_sum_exp(device: str) -> None:
    q, k, v = (x.detach() for x in inputs(device, 7, 12))
    activate(device)
    lse = ATEN._scaled_dot_product_flash_attention(q, k, v)[1]
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    assert_equals(lse, scores.logsumexp(-1), 1e-5)


def test_dropout(device: str, calls: list[str]) -> None:
    """Follows the seed; the backward draws the forward's mask again."""
    q, k, v = inputs(device, 64, 96)
    activate(device)

    def attention() -> tuple[Tensor, Tensor]:
        results = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.5, False, True)
        return results[0], results[8]

    torch.manual_seed(3)
    out, dmask = attention()
    assert dmask.shape == (2, 4, 128, 128)
    dropped = (torch.signbit(dmask[:, :, :64, :96])).double().mean().item()
    assert abs(dropped - 0.5) < 0.02
    torch.manual_seed(3)
    assert torch.equal(attention()[0], out)
    assert not torch.equal(attention()[0], out)

    # out = A v with a random A, so that <g, A v> = <A^T g, v> if and only if A is the same.
    g = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, g)
    assert calls[-1] == "_bwd"
    forward, backward = (x.double().sum().item() for x in (g * out, dv * v))
    scale = (g.double() * out.double()).abs().sum().item()
    assert abs(forward - backward) < 1e-2 * scale**0.5


def test_debug_mask_without_dropout_is_torchs_error(device: str) -> None:
    activate(device)
    leaves = inputs(device)
    with pytest.raises(UnsupportedError if device == "cpu" else RuntimeError):
        ATEN._scaled_dot_product_flash_attention(*leaves, 0.0, False, True)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "packed"])
def test_results_look_as_compiled_graphs_expect(layout: str, device: str) -> None:
    def described(results: Any) -> list[Any]:
        return [(x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else x for x in results]

    def both_passes(leaves: tuple[Tensor, ...]) -> list[Any]:
        out, lse, *_, seed, offset, dmask = ATEN._scaled_dot_product_flash_attention(*leaves)
        lengths = (None, None, leaves[0].shape[2], leaves[1].shape[2])
        gradients = ATEN._scaled_dot_product_flash_attention_backward(
            torch.ones_like(out), *leaves, out, lse, *lengths, 0.0, False, seed, offset
        )
        return described([out, lse, seed, offset, dmask, *gradients])

    activate(device)
    leaves = tuple(x.detach() for x in inputs(device, layout=layout))
    with FakeTensorMode() as mode:
        expected = both_passes(tuple(mode.from_tensor(x) for x in leaves))
    assert both_passes(leaves) == expected


# ---- packed sequences -------------------------------------------------------------------------

LENGTHS_Q, LENGTHS_K = [5, 0, 17, 9], [8, 3, 17, 6]


def packed_inputs(device: str, num_heads_kv: int = 2) -> tuple[Tensor, ...]:
    new = {"device": device, "dtype": HALF[device]}
    return (
        randn(sum(LENGTHS_Q), 4, 16, **new),
        randn(sum(LENGTHS_K), num_heads_kv, 16, **new),
        randn(sum(LENGTHS_K), num_heads_kv, 16, **new),
    )


def one_by_one(
    leaves: tuple[Tensor, ...],
    dtype: torch.dtype,
    left: int,
    right: int,
    lengths_q: list[int] = LENGTHS_Q,
    lengths_k: list[int] = LENGTHS_K,
) -> list[Tensor]:
    """Each sequence through torch's SDPA with its own mask."""
    leaves = tuple(x.detach().to(dtype).requires_grad_() for x in leaves)
    outs = []
    q, k, v = leaves
    for x, y, z in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        i = torch.arange(x.shape[0], device=x.device)[:, None] + y.shape[0] - x.shape[0]
        j = torch.arange(y.shape[0], device=x.device)
        mask = (j >= i - left if left >= 0 else j >= 0) & (j <= i + right if right >= 0 else j >= 0)
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                *(t.transpose(0, 1)[None] for t in (x, y, z)), attn_mask=mask, enable_gqa=True
            )
        outs.append(out[0].transpose(0, 1))
    return with_gradients(torch.cat(outs), leaves)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 1)])
def test_varlen_attn(window: tuple[int, int], device: str, calls: list[str]) -> None:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": window}
    has_groups = "enable_gqa" in varlen_attn.__kwdefaults__  # of torch >= 2.12
    if has_groups:
        options["enable_gqa"] = True
    leaves = packed_inputs(device, num_heads_kv=2 if has_groups else 4)
    lengths = (cu_seqlens(LENGTHS_Q, device), cu_seqlens(LENGTHS_K, device), 17, 17)
    yardsticks = [one_by_one(leaves, HALF[device], *window)]
    if device == "cuda":
        yardsticks.append(with_gradients(varlen_attn(*leaves, *lengths, **options), leaves))
    activate(device)
    results = with_gradients(varlen_attn(*leaves, *lengths, **options), leaves)
    assert calls == ["_varlen_fwd_out", "_varlen_bwd"]
    assert_close(results, one_by_one(leaves, torch.float64, *window), *yardsticks)


def test_used_lengths_of_keys(device: str, calls: list[str]) -> None:
    q, k, v = (x.detach() for x in packed_inputs(device))
    used = int32([4, 3, 10, 1], device)
    activate(device)
    lengths = (cu_seqlens(LENGTHS_Q, device), cu_seqlens(LENGTHS_K, device), 17, 17)
    out = ATEN._flash_attention_forward(q, k, v, *lengths, 0.0, False, False, seqused_k=used)[0]
    assert calls == ["_varlen_fwd_out"]
    keep = torch.cat([torch.arange(n) < m for n, m in zip(LENGTHS_K, used.tolist(), strict=True)])
    lengths = (cu_seqlens(LENGTHS_Q, device), cu_seqlens(used.tolist(), device), 17, 17)
    expected = ATEN._flash_attention_forward(
        q, k[keep.to(device)], v[keep.to(device)], *lengths, 0.0, False, False
    )[0]
    assert torch.equal(out, expected)


def test_a_given_buffer(device: str, calls: list[str]) -> None:
    if not hasattr(ATEN, "_flash_attention_forward_no_dropout_inplace"):
        return
    q, k, v = (x.detach() for x in packed_inputs(device))
    activate(device)
    lengths = (cu_seqlens(LENGTHS_Q, device), cu_seqlens(LENGTHS_K, device), 17, 17)
    out, lse, *_ = ATEN._flash_attention_forward(q, k, v, *lengths, 0.0, True, False)
    buffer = torch.full_like(q, torch.nan)
    again = ATEN._flash_attention_forward_no_dropout_inplace(
        buffer, q, k, v, *lengths, 0.0, True, False
    )
    assert calls == ["_varlen_fwd_out"] * 2
    assert torch.equal(buffer, out)
    assert torch.equal(again, lse)


@pytest.mark.parametrize(
    "options",
    [{"alibi_slopes": torch.rand(4)}, {"seqused_k": int32([2, 2])}],
    ids=["alibi", "used lengths without cu_seqlens"],
)
def test_fixed_lengths_of_the_packed_op(options: dict[str, Tensor], calls: list[str]) -> None:
    """What the CPU can show: served as fixed lengths, refused with the name of the op."""
    leaves = inputs("cpu")
    default = by_default(leaves)
    sdpa.activate(devices=("cpu",))
    tensors = (x.transpose(1, 2) for x in leaves)
    arguments = (*tensors, None, None, 33, 33, 0.0, False, False)
    out = ATEN._flash_attention_forward(*arguments)[0]
    results = with_gradients(out.transpose(1, 2), leaves)
    assert calls == ["_fwd_out", "_bwd"]
    assert_as_torch(results, leaves, default)
    with pytest.raises(UnsupportedError, match="aten::_flash_attention_forward on CPU"):
        ATEN._flash_attention_forward(*arguments, **options)


def test_jagged_nested_tensors(calls: list[str]) -> None:
    require(NEEDS_CUDA)
    lengths = [5, 17, 9]
    leaves = tuple(
        randn(sum(lengths), 4, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )

    def nested(x: Tensor) -> Tensor:
        offsets = cu_seqlens(lengths, "cuda").long()
        return torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2)

    def both_passes() -> list[Tensor]:
        out = F.scaled_dot_product_attention(*(nested(x) for x in leaves))
        return with_gradients(out.transpose(1, 2).values(), leaves)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        default = both_passes()
    assert calls == []
    activate("cuda")
    results = both_passes()
    assert calls == ["_varlen_fwd_out", "_varlen_bwd"]
    of_lengths = (-1, -1, lengths, lengths)
    exact = one_by_one(leaves, torch.float64, *of_lengths)
    assert_close(results, exact, one_by_one(leaves, torch.bfloat16, *of_lengths), default)


# ---- activation -------------------------------------------------------------------------------


def test_restore_gives_everything_back(device: str, calls: list[str]) -> None:
    leaves = inputs(device)
    order = torch._C._get_sdp_priority_order()
    before = F.scaled_dot_product_attention(*leaves)
    assert not sdpa.is_active()
    sdpa.restore()  # nothing to do, no complaint
    activate(device)
    activate(device)
    assert sdpa.is_active()
    assert torch_attention.current_flash_attention_impl() == sdpa.NAME
    if device == "cuda":
        q, k, v = leaves
        assert torch._fused_sdp_choice(q, k, v) == SDPBackend.FLASH_ATTENTION.value
    sdpa.restore()
    assert not sdpa.is_active()
    assert torch._C._get_sdp_priority_order() == order
    assert torch.equal(F.scaled_dot_product_attention(*leaves), before)
    assert calls == []


def test_order_is_left_alone_if_so_asked(device: str) -> None:
    order = torch._C._get_sdp_priority_order()
    sdpa.activate(devices=(device,), prefer=False)
    assert torch._C._get_sdp_priority_order() == order


def test_order_is_changed_where_cuda_is_not_used_yet() -> None:
    """Torch sets its order at the first call on a GPU, over one that was set before."""
    require(NEEDS_CUDA)

    def printed(code: str) -> list[str]:
        code = (
            "import torch, torch.nn.attention\n"
            "from flash_attn_ext.integrations import sdpa\n"
            "def choice():\n"
            "    x = torch.zeros(1, 1, 8, 64, device='cuda', dtype=torch.half)\n"
            "    return torch._fused_sdp_choice(x, x, x)\n"
        ) + code
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    without = printed("print(choice())")
    within = printed(
        "sdpa.activate()\n"
        "print(torch.cuda.is_initialized(), choice())\n"
        "sdpa.restore()\n"
        "print(choice())\n"
    )
    assert within == ["False", str(SDPBackend.FLASH_ATTENTION.value), *without]


def test_unknown_device() -> None:
    with pytest.raises(ValueError, match="devices: got 'tpu'"):
        sdpa.activate(devices=("tpu",))


def test_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch_attention, "register_flash_attention_impl")
    with pytest.raises(UnsupportedError, match=r"expected torch >= 2\.11"):
        sdpa.activate()


def test_environment_variable() -> None:
    code = "import flash_attn_ext, torch.nn.attention as a; print(a.current_flash_attention_impl())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FLASH_ATTN_EXT_SDPA": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == sdpa.NAME, done.stderr
