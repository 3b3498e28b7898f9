"""delta = rowsum(dout * out) - dlse, on every device: kernel and tiled backend."""

from __future__ import annotations

import pytest
import torch
from attention_cases import op
from helpers import assert_close_2x, assert_equals
from torch import Tensor

pytestmark = pytest.mark.parametrize("overload", ["default", "tiled"])

SHAPES = {
    "batch": (2, 37, 3),
    "packed": (41, 3),
    "one_row": (1, 1, 1),
    "no_rows": (2, 0, 3),
    "no_sequences": (0, 7, 3),
}


def _expected(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    delta = (out.double() * dout.double()).sum(-1).transpose(-1, -2)
    return delta if dlse is None else delta - dlse.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim_v", [1, 20, 64, 96, 160, 256])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("with_dlse", [False, True], ids=["no_dlse", "dlse"])
def test_equals_rowsum(
    shape: tuple[int, ...],
    head_dim_v: int,
    dtype: torch.dtype,
    with_dlse: bool,
    device: str,
    overload: str,
) -> None:
    out = torch.randn(*shape, head_dim_v, device=device).to(dtype)
    dout = torch.randn(*shape, head_dim_v, device=device).to(dtype)
    statistics = (*shape[:-2], shape[-1], shape[-2])
    dlse = torch.randn(statistics, device=device) if with_dlse else None
    delta = op("bwd_preprocess", overload)(out, dout, dlse)
    expected = _expected(out, dout, dlse)
    assert delta.dtype == torch.float32
    assert delta.is_contiguous()
    plain = (out.float() * dout.float()).sum(-1).transpose(-1, -2) - (0 if dlse is None else dlse)
    assert_close_2x(delta, expected, plain)


def test_fp64(device: str, overload: str) -> None:
    out, dout = (torch.randn(2, 9, 3, 32, dtype=torch.float64, device=device) for _ in range(2))
    delta = op("bwd_preprocess", overload)(out, dout, None)
    assert delta.dtype == torch.float64
    assert_equals(delta, _expected(out, dout, None), 1e-13)


def test_strides(device: str, overload: str) -> None:
    out = torch.randn(2, 3, 37, 64, device=device).transpose(1, 2)
    dout = torch.randn(2, 37, 3, 100, device=device)[..., 3:67]
    dlse = torch.randn(37, 3, 2, device=device).permute(2, 1, 0)
    delta = op("bwd_preprocess", overload)(out, dout, dlse)
    assert_equals(delta, _expected(out, dout, dlse), 1e-4)
