"""Shared by all tests: devices, allowed skips, comparison with fp64, poison, random inputs.

A test that lacks something calls ``require(NEEDS_...)``. The reasons stand here, each with the
condition under which it may be used; conftest.py fails every other skip, so that a machine which
has the thing cannot skip silently.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

NEEDS_CUDA = "needs a CUDA GPU"
NEEDS_TWO_GPUS = "needs two CUDA GPUs"
NEEDS_GPU_MEMORY = "needs a CUDA GPU with 32 GB of memory"
NEEDS_LIBRARY = "needs the compiled library (flash_attn_ext/_C.abi3.so)"
NEEDS_INTROSPECT = "needs the compiled module flash_attn_ext._introspect"
NEEDS_NVCC = "needs nvcc"
NEEDS_CXX = "needs a C++ compiler (g++)"
NEEDS_GIT_CHECKOUT = "needs a git checkout"
NEEDS_LINUX = "needs Linux"
NEEDS_TORCH_2_11 = "needs torch >= 2.11"
NEEDS_TRANSFORMERS_5 = "needs transformers >= 5"
NEEDS_TRANSFORMERS_5_23 = "needs transformers >= 5.23"


def _lacks_library() -> bool:
    from flash_attn_ext import _load

    return not _load.status().binder_loaded


def _lacks_introspect() -> bool:
    from flash_attn_ext import _load

    return _load.status().introspect is None


def _lacks_gpu_memory() -> bool:
    if not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_properties(0).total_memory < 30 * 2**30


def _lacks_nvcc() -> bool:
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    homes.append("/usr/local/cuda")
    return shutil.which("nvcc") is None and not any(
        os.path.exists(os.path.join(home, "bin", "nvcc")) for home in homes if home
    )


def _lacks_transformers(*oldest: int) -> bool:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return True
    return tuple(int(x) for x in version.split(".")[:2]) < oldest


ALLOWED_SKIPS: dict[str, Callable[[], bool]] = {
    NEEDS_CUDA: lambda: not torch.cuda.is_available(),
    NEEDS_TWO_GPUS: lambda: torch.cuda.device_count() < 2,
    NEEDS_GPU_MEMORY: _lacks_gpu_memory,
    NEEDS_LIBRARY: _lacks_library,
    NEEDS_INTROSPECT: _lacks_introspect,
    NEEDS_NVCC: _lacks_nvcc,
    NEEDS_CXX: lambda: shutil.which(os.environ.get("CXX", "g++")) is None,
    NEEDS_GIT_CHECKOUT: lambda: (
        shutil.which("git") is None
        or not os.path.exists(os.path.join(os.path.dirname(__file__), "..", ".git"))
    ),
    NEEDS_TRANSFORMERS_5: lambda: _lacks_transformers(5, 0),
    NEEDS_TRANSFORMERS_5_23: lambda: _lacks_transformers(5, 23),
    NEEDS_LINUX: lambda: sys.platform != "linux",
    NEEDS_TORCH_2_11: lambda: torch.torch_version.TorchVersion(torch.__version__) < (2, 11),
}
"""Reason of a skip -> whether this machine really lacks the thing."""


def needs_module(name: str) -> str:
    """The allowed reason of a test that needs an optional Python module."""
    return f"needs the Python module {name}"


NEEDS_TRANSFORMERS = needs_module("transformers")


@functools.cache
def skip_is_allowed(reason: str) -> bool:
    """True if `reason` is one of the list and this machine lacks what it names."""
    prefix = needs_module("")
    if reason.startswith(prefix):
        return importlib.util.find_spec(reason[len(prefix) :]) is None
    return reason in ALLOWED_SKIPS and ALLOWED_SKIPS[reason]()


def require(reason: str) -> None:
    """Skips the running test if this machine lacks what `reason` names."""
    if skip_is_allowed(reason):
        pytest.skip(reason)


def devices() -> list[str]:
    """Devices that every op test runs on."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def randn(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """Normal random numbers; drawn on the CPU in fp64, so that every device and type sees the same.

    Returns:
        A leaf that requires grad.
    """
    values = torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)
    return values.requires_grad_()


def int32(values: list[int], device: str = "cpu") -> Tensor:
    """An int32 tensor, the type of every length, offset and page id."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def cu_seqlens(seqlens: list[int], device: str = "cpu") -> Tensor:
    """Start of each sequence and the end of the last one, int32 [batch_size + 1]."""
    return int32([0, *torch.tensor(seqlens, dtype=torch.int64).cumsum(0).tolist()], device)


def rng_state(seed: int = 1234, offset: int = 5, device: str = "cpu") -> Tensor:
    """The (seed, offset) pair of dropout, int64 [2]."""
    return torch.tensor([seed, offset], dtype=torch.int64, device=device)


def poisoned(x: Tensor, keep: Tensor) -> Tensor:
    """Copy of x with NaN wherever the boolean mask `keep` (leading dimensions of x) is false."""
    keep = keep.reshape(*keep.shape, *([1] * (x.dim() - keep.dim())))
    return torch.where(keep, x.detach(), torch.nan)


def poisoned_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A buffer full of NaN: every element that an op forgets to write shows."""
    return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)


def within(lengths: list[int], size: int, device: str = "cpu") -> Tensor:
    """Boolean [len(lengths), size]: position < length."""
    return torch.arange(size, device=device) < int32(lengths, device)[:, None]


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference in fp64; equal infinities differ by 0, NaN by infinity."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
    difference = torch.nan_to_num(difference, nan=torch.inf)
    return difference.max().item() if difference.numel() else 0.0


def assert_close_2x(
    out: Tensor, ref64: Tensor, same_dtype: Tensor, slack: float = 1e-5, name: str = "out"
) -> None:
    """The error of `out` is at most twice that of plain PyTorch in the same dtype, plus `slack`.

    Args:
        out: the result under test.
        ref64: the same computed in fp64.
        same_dtype: the same computed by plain PyTorch operations in out's dtype.
        slack: absolute, for results where the plain implementation happens to be exact.
        name: of the tensor, for the message.
    """
    error, plain = max_error(out, ref64), max_error(same_dtype, ref64)
    assert error <= 2 * plain + slack, (
        f"{name}: error {error:.3e} against fp64; plain PyTorch in {same_dtype.dtype} has "
        f"{plain:.3e}, so at most {2 * plain + slack:.3e} is allowed"
    )


def assert_equals(actual: Tensor, expected: Tensor, tolerance: float, name: str = "out") -> None:
    """Largest absolute difference <= tolerance, NaN nowhere, equal infinities."""
    error = max_error(actual, expected)
    assert error <= tolerance, f"{name}: error {error:.3e}, at most {tolerance:.1e} is allowed"
