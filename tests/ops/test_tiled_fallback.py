"""What the user hears when PyTorch operations stand in for a CUDA kernel."""

from __future__ import annotations

import types
import warnings

import pytest
import torch

from flash_attn_ext import backends
from flash_attn_ext.errors import FallbackWarning, UnsupportedError

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
