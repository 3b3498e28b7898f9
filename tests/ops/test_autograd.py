"""Gradients: of every input, of lse, through packed tensors, with dropout, and their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_equals, cu_seqlens, randn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flash_attn_ext as fa
from flash_attn_ext import autograd
from flash_attn_ext.reference import attention_reference

pytestmark = pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")


def inputs(device: str, seqlens: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, seqlens[0], 4, 8), (2, seqlens[1], 2, 8), (2, seqlens[1], 2, 12))
    q, k, v = (randn(*shape, device=device) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (2, 1)},
        {"softcap": 1.5, "softmax_scale": 0.7},
        {"causal": True, "deterministic": True},
    ],
)
@pytest.mark.parametrize("seqlens", [(5, 7), (7, 5), (3, 0)])
@pytest.mark.parametrize("use", ["out", "lse", "both"])
def test_gradients(
    options: dict[str, Any], seqlens: tuple[int, int], use: str, device: str
) -> None:
    leaves = inputs(device, seqlens)
    actual = fa.flash_attn_func(*leaves, return_softmax_lse=True, **options)
    plain = {name: value for name, value in options.items() if name != "deterministic"}
    expected = attention_reference(*leaves, **plain)[:2]
    picked = {"out": slice(0, 1), "lse": slice(1, 2), "both": slice(0, 2)}[use]
    weights = [torch.randn_like(x) for x in expected[picked]]
    for a, b, name in zip(
        torch.autograd.grad(actual[picked], leaves, weights),
        torch.autograd.grad(expected[picked], leaves, weights, materialize_grads=True),
        ("dq", "dk", "dv"),
        strict=True,
    ):
        assert_equals(a, b, 1e-11, name)


def test_gradcheck(device: str) -> None:
    slopes = torch.rand(4, device=device)

    def function(*leaves: Tensor) -> Any:
        return fa.flash_attn_func(
            *leaves, causal=True, softcap=2.0, alibi_slopes=slopes, return_softmax_lse=True
        )

    assert torch.autograd.gradcheck(function, inputs(device, (3, 4)), fast_mode=True)


def test_dropout_gradient_uses_the_same_mask(device: str) -> None:
    leaves = inputs(device)
    out, _, dmask = fa.flash_attn_func(*leaves, dropout_p=0.4, return_attn_probs=True)
    is_kept = ~dmask[:, :, :5, :7].signbit()
    expected = attention_reference(*leaves, dropout_p=0.4, dropout_mask=is_kept).out
    weights = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, weights),
        torch.autograd.grad(expected, leaves, weights),
        strict=True,
    ):
        assert_equals(a, b, 1e-11)


def test_checkpointing_repeats_the_mask(device: str) -> None:
    leaves = inputs(device)

    def function(*leaves: Tensor) -> Tensor:
        return fa.flash_attn_func(*leaves, dropout_p=0.4)

    torch.manual_seed(5)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    torch.manual_seed(5)
    out = checkpoint(function, *leaves, use_reentrant=False)
    torch.manual_seed(6)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


def test_dmask_is_not_differentiable(device: str) -> None:
    out, lse, dmask = fa.flash_attn_func(*inputs(device), dropout_p=0.4, return_attn_probs=True)
    assert out.requires_grad
    assert lse.requires_grad
    assert not dmask.requires_grad


@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_input_that_requires_grad(index: int, device: str) -> None:
    leaves = inputs(device)
    expected = torch.autograd.grad(fa.flash_attn_func(*leaves).sum(), leaves)[index]
    one = [x.detach().requires_grad_(i == index) for i, x in enumerate(leaves)]
    fa.flash_attn_func(*one).sum().backward()
    assert torch.equal(one[index].grad, expected)
    assert all(x.grad is None for i, x in enumerate(one) if i != index)


def test_no_function_where_no_gradient_is_needed(device: str) -> None:
    leaves = inputs(device)
    with torch.no_grad():
        assert fa.flash_attn_func(*leaves).grad_fn is None
    assert fa.flash_attn_func(*(x.detach() for x in leaves)).grad_fn is None


def test_qkvpacked_gradient(device: str) -> None:
    qkv = randn(2, 5, 3, 4, 8, device=device)
    weights = torch.randn(2, 5, 4, 8, dtype=qkv.dtype, device=device)
    parts = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    expected = torch.stack(
        torch.autograd.grad(fa.flash_attn_func(*parts, causal=True), parts, weights), dim=2
    )
    out = fa.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(torch.autograd.grad(out, qkv, weights)[0], expected)

    flat = qkv.detach().flatten(2, 3).requires_grad_()
    out = fa.flash_attn_qkvpacked_func(flat, causal=True, num_heads_q=4)
    assert torch.equal(torch.autograd.grad(out, flat, weights)[0], expected.flatten(2, 3))

    q, kv = (x.detach().requires_grad_() for x in (qkv[:, :, 0], qkv[:, :, 1:]))
    out = fa.flash_attn_kvpacked_func(q, kv, causal=True)
    dq, dkv = torch.autograd.grad(out, (q, kv), weights)
    assert torch.equal(dq, expected[:, :, 0])
    assert torch.equal(dkv, expected[:, :, 1:])


def test_varlen_packed_gradient(device: str) -> None:
    qkv = randn(9, 3, 4, 8, device=device)
    starts = cu_seqlens([4, 5], device)
    weights = torch.randn(9, 4, 8, dtype=qkv.dtype, device=device)
    parts = [x.detach().requires_grad_() for x in qkv.unbind(1)]
    out = fa.flash_attn_varlen_func(*parts, starts, starts, 5, 5, causal=True)
    expected = torch.stack(torch.autograd.grad(out, parts, weights), dim=1)
    out = fa.flash_attn_varlen_qkvpacked_func(qkv, starts, 5, causal=True)
    assert torch.equal(torch.autograd.grad(out, qkv, weights)[0], expected)
    q, kv = (x.detach().requires_grad_() for x in (qkv[:, 0], qkv[:, 1:]))
    out = fa.flash_attn_varlen_kvpacked_func(q, kv, starts, starts, 5, 5, causal=True)
    dq, dkv = torch.autograd.grad(out, (q, kv), weights)
    assert torch.equal(torch.cat([dq[:, None], dkv], dim=1), expected)


def test_varlen_lse_gradient(device: str) -> None:
    leaves = [randn(9, heads, 8, device=device) for heads in (4, 2, 2)]
    starts = cu_seqlens([4, 5], device)

    def function(*leaves: Tensor) -> Any:
        return fa.flash_attn_varlen_func(
            *leaves, starts, starts, 5, 5, causal=True, return_softmax_lse=True
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_gradient_of_any_strides(device: str) -> None:
    leaves = inputs(device)
    out = fa.flash_attn_func(*leaves)
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)  # strides of 0
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for a, b in zip(expected, dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("of_dout", [False, True])
def test_second_derivative_is_an_error(of_dout: bool, device: str) -> None:
    q, k, v = inputs(device)
    out = fa.flash_attn_func(q, k, v)
    dout = torch.randn_like(out).requires_grad_(of_dout)
    (dq,) = torch.autograd.grad(out, q, dout, create_graph=True)
    assert_equals(dq, torch.autograd.grad(fa.flash_attn_func(q, k, v), q, dout)[0], 1e-12)
    with pytest.raises(fa.UnsupportedError, match="got a second derivative, expected the first"):
        dq.sum().backward()


@pytest.mark.parametrize("source", ["argument", "environment", "torch"])
def test_deterministic(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not autograd.is_deterministic(False)
    if source == "environment":
        monkeypatch.setattr(autograd, "_ALWAYS_DETERMINISTIC", True)
    if source == "torch":
        torch.use_deterministic_algorithms(True)
    try:
        assert autograd.is_deterministic(source == "argument")
    finally:
        torch.use_deterministic_algorithms(False)


def test_functorch_transforms_get_the_answer_of_torch(device: str) -> None:
    """No setup_context, so torch refuses; and afterwards gradients are as before."""
    q, k, v = (randn(1, 4, 2, 8, dtype=torch.float32, device=device) for _ in range(3))

    def loss(x: Tensor) -> Tensor:
        return fa.flash_attn_func(x, k, v).sum()

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss)(q)
    (dq,) = torch.autograd.grad(loss(q), q)
    assert dq.isfinite().all()


@pytest.mark.parametrize("missing", ["_transforms_are_active", "_unwrap_if_dead"])
def test_without_the_parts_of_apply(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(1, 4, 2, 8, dtype=torch.float32, device="cpu") for _ in range(3))
    expected = torch.autograd.grad(fa.flash_attn_func(q, k, v).sum(), q)
    monkeypatch.setattr(autograd, missing, None)
    assert torch.equal(torch.autograd.grad(fa.flash_attn_func(q, k, v).sum(), q)[0], expected[0])
