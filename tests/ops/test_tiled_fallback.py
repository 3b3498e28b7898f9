"""What the user hears when PyTorch operations stand in for a CUDA kernel."""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import NEEDS_CUDA, NEEDS_LIBRARY, int32, require
from torch import Tensor

import flash_attn_ext
from flash_attn_ext import autograd, backends, kvcache
from flash_attn_ext.errors import FallbackWarning, UnsupportedError
from flash_attn_ext.layers import rotary

CUDA_TENSOR = types.SimpleNamespace(is_cuda=True, device="cuda:0")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_ATTN_EXT_BACKEND", raising=False)
    monkeypatch.delenv("FLASH_ATTN_EXT_FALLBACK", raising=False)
    monkeypatch.setattr(backends, "_warned", set())


def test_warns_once_per_op() -> None:
    with pytest.warns(FallbackWarning, match=r"flash_attn_ext\.fwd on cuda:0 .*explain"):
        backends.note_fallback("fwd", CUDA_TENSOR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.note_fallback("fwd", CUDA_TENSOR)
    with pytest.warns(FallbackWarning, match="bwd"):
        backends.note_fallback("bwd", CUDA_TENSOR)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("FLASH_ATTN_EXT_FALLBACK", "allow"), ("FLASH_ATTN_EXT_BACKEND", "tiled")],
)
def test_silent_where_asked_for(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.note_fallback("fwd", CUDA_TENSOR)


def test_error_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    with pytest.raises(UnsupportedError, match=r"flash_attn_ext\.fwd: no kernel takes"):
        backends.note_fallback("fwd", CUDA_TENSOR)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("FLASH_ATTN_EXT_FALLBACK", "expected one of warn, allow, error"),
        ("FLASH_ATTN_EXT_BACKEND", "expected one of auto, tiled"),
    ],
)
def test_unknown_value(variable: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "fastest")
    with pytest.raises(ValueError, match=rf"{variable}='fastest': {expected}"):
        backends.note_fallback("fwd", CUDA_TENSOR)


def test_cpu_tensors_are_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    backends.note_fallback("fwd", torch.zeros(1))


def test_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.chosen_backend() == "auto"
    monkeypatch.setenv("FLASH_ATTN_EXT_BACKEND", "tiled")
    assert backends.chosen_backend() == "tiled"


LOST = 'torch_call_dispatcher(name, "tiled", ...) API call failed at stable_torch.h, line 1'
"""What is left of an exception of the tiled backend behind the compiled library."""


def _binder(op: str) -> Callable[..., Tensor]:
    """Stands for the compiled library: calls the tiled backend and loses its exception."""

    def call(*arguments: object) -> Tensor:
        try:
            backends.note_fallback(op, CUDA_TENSOR)
        except UnsupportedError:
            pass
        raise RuntimeError(LOST)

    return call


def _tensor(*shape: int, device: str = "cpu", grad: bool = False) -> Tensor:
    """fp64, for which there is no kernel."""
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=grad)


def _attention(device: str, grad: bool = False, **options: Tensor) -> Tensor:
    q, k, v = (_tensor(1, 4, 2, 8, device=device, grad=grad) for _ in range(3))
    return flash_attn_ext.flash_attn_func(q, k, v, **options)


def _varlen(device: str, grad: bool = False, **options: Tensor) -> Tensor:
    q, k, v = (_tensor(4, 2, 8, device=device, grad=grad) for _ in range(3))
    lengths = int32([0, 1, 4], device)
    return flash_attn_ext.flash_attn_varlen_func(q, k, v, lengths, lengths, 3, 3, **options)


def _cache(device: str, append: bool) -> object:
    q, k_cache, v_cache = (_tensor(1, 4, 2, 8, device=device) for _ in range(3))
    new = _tensor(1, 1, 2, 8, device=device) if append else None
    seqlens = int32([2], device)
    return flash_attn_ext.flash_attn_with_kvcache(
        q[:, :1], k_cache, v_cache, new, new, cache_seqlens=seqlens
    )


def _combine(device: str, **options: Tensor) -> object:
    partial = torch.randn(2, 1, 3, 2, 8, device=device)
    return flash_attn_ext.flash_attn_combine(partial, partial[..., 0].contiguous(), **options)


def _rotary(device: str, inplace: bool = False, grad: bool = False) -> object:
    angles = _tensor(4, 4, device=device)
    x = _tensor(1, 4, 2, 8, device=device, grad=grad)
    return rotary.apply_rotary_emb(x, angles.cos(), angles.sin(), inplace=inplace)


CALLS: list[tuple[str, types.ModuleType, Callable[[str], object]]] = [
    ("fwd", autograd, _attention),
    ("fwd", autograd, lambda device: _attention(device, grad=True)),
    ("fwd_out", autograd, lambda device: _attention(device, out=_tensor(1, 4, 2, 8))),
    ("varlen_fwd", autograd, _varlen),
    ("varlen_fwd", autograd, lambda device: _varlen(device, grad=True)),
    ("varlen_fwd_out", autograd, lambda device: _varlen(device, out=_tensor(4, 2, 8))),
    ("rotary", autograd, _rotary),
    ("rotary", autograd, lambda device: _rotary(device, grad=True)),
    ("rotary_", rotary, lambda device: _rotary(device, inplace=True)),
    ("kvcache_fwd", kvcache, lambda device: _cache(device, append=False)),
    ("kvcache_append_fwd", kvcache, lambda device: _cache(device, append=True)),
    ("combine", kvcache, _combine),
    ("combine_out", kvcache, lambda device: _combine(device, out=torch.empty(1, 3, 2, 8))),
]
"""Op, the module that calls it, a call of the API that ends there."""


@pytest.mark.parametrize(("op", "module", "call"), CALLS)
def test_refusal_behind_the_library(
    op: str,
    module: types.ModuleType,
    call: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, f"_{op}", _binder(op))
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    with pytest.raises(
        UnsupportedError, match=rf"flash_attn_ext\.{op}: no kernel .*explain"
    ) as caught:
        call("cpu")
    assert str(caught.value.__cause__) == LOST

    # The same failure for another reason: no refusal of an earlier call is blamed for it.
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "allow")
    with pytest.raises(RuntimeError, match="torch_call_dispatcher"):
        call("cpu")


@pytest.mark.parametrize(("op", "forward"), [("bwd", _attention), ("varlen_bwd", _varlen)])
def test_refusal_behind_the_library_in_a_backward(
    op: str, forward: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, f"_{op}", _binder(op))
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    out = forward("cpu", grad=True)
    with pytest.raises(UnsupportedError, match=rf"flash_attn_ext\.{op}: no kernel"):
        out.sum().backward()
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "allow")
    out = forward("cpu", grad=True)
    with pytest.raises(RuntimeError, match="torch_call_dispatcher"):
        out.sum().backward()


def test_other_errors_stay_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    with pytest.raises(UnsupportedError):
        backends.note_fallback("fwd", CUDA_TENSOR)
    backends.raise_refusal_behind(RuntimeError("CUDA error: out of memory"))

    # Once asked about, a refusal is forgotten; that of another thread is not this one's.
    with pytest.raises(UnsupportedError):
        backends.note_fallback("fwd", CUDA_TENSOR)
    thread = threading.Thread(target=backends.raise_refusal_behind, args=[RuntimeError(LOST)])
    thread.start()
    thread.join()
    with pytest.raises(UnsupportedError, match="fwd"):
        backends.raise_refusal_behind(RuntimeError(LOST))
    backends.raise_refusal_behind(RuntimeError(LOST))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("fwd", _attention),
        ("varlen_fwd", _varlen),
        ("rotary", _rotary),
        ("rotary_", lambda device: _rotary(device, inplace=True)),
        ("kvcache_fwd", lambda device: _cache(device, append=False)),
        ("kvcache_append_fwd", lambda device: _cache(device, append=True)),
    ],
)
def test_refusal_on_a_gpu(
    op: str, call: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    require(NEEDS_CUDA)
    require(NEEDS_LIBRARY)
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    with pytest.raises(UnsupportedError, match=rf"flash_attn_ext\.{op}: no kernel"):
        call("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "forward"), [("bwd", _attention), ("varlen_bwd", _varlen)])
def test_refusal_of_a_backward_on_a_gpu(
    op: str, forward: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    require(NEEDS_CUDA)
    require(NEEDS_LIBRARY)
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "allow")
    out = forward("cuda", grad=True)
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    with pytest.raises(UnsupportedError, match=rf"flash_attn_ext\.{op}: no kernel"):
        out.sum().backward()
