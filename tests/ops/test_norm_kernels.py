"""The norm ops and their gradient on every device: kernels, and the tiled backend."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import op
from helpers import (
    NEEDS_CUDA,
    NEEDS_GPU_MEMORY,
    NEEDS_LIBRARY,
    assert_close_2x,
    assert_equals,
    randn,
    require,
    rng_state,
)
from torch import Tensor

from flash_attn_ext import UnsupportedError, _philox
from flash_attn_ext.ops import _kernels
from flash_attn_ext.ops import layer_norm as norms

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
KINDS = pytest.mark.parametrize("is_rms", [False, True], ids=["layer_norm", "rms_norm"])
# 1 to whole CTAs; not multiples of 8; more lanes than a power of two.
SIZES = (1, 7, 8, 24, 100, 768, 1000, 1537, 4096)
EPS = 1e-5


def normalised(total: Tensor, weight: Tensor, bias: Tensor | None, is_rms: bool) -> Tensor:
    """Of fp64 tensors by torch's own functions; of others in plain operations of their type."""
    size = (total.shape[-1],)
    if total.dtype == F64:
        out = F.rms_norm(total, size, weight, EPS) if is_rms else F.layer_norm(total, size, weight)
        if is_rms:
            return out if bias is None else out + bias
        return F.layer_norm(total, size, weight, bias, EPS)
    centred = total if is_rms else total - total.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS) * weight
    return out if bias is None else out + bias


class Case:
    """Inputs of one problem, the results of the ops, and the same in fp64 and in plain PyTorch."""

    def __init__(
        self,
        device: str,
        rows: int,
        size: int,
        dtype: torch.dtype,
        *,
        is_rms: bool = False,
        sum_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
        bias: bool = True,
        dropout_p: float = 0.0,
        rowscale: bool = False,
        offset: float = 0.0,
    ) -> None:
        def tensor(*shape: int, of: torch.dtype) -> Tensor:
            return randn(*shape, dtype=of, device=device).detach()

        self.is_rms, self.dropout_p, self.offset = is_rms, dropout_p, offset
        self.x = tensor(rows, size, of=dtype)
        self.residual = None if sum_dtype is None else tensor(rows, size, of=sum_dtype)
        self.weight = tensor(size, of=weight_dtype or dtype)
        self.bias = tensor(size, of=weight_dtype or dtype) if bias else None
        self.rowscale = torch.rand(rows, device=device) if rowscale else None
        self.rng_state = rng_state(device=device) if dropout_p else None
        self.dout = tensor(rows, size, of=dtype)
        self.dsum = tensor(rows, size, of=sum_dtype or dtype)

    @property
    def changes(self) -> bool:
        return not (self.residual is None and self.rowscale is None and self.rng_state is None)

    def compute(self, overload: str) -> dict[str, Tensor]:
        tensors = (self.x, self.residual, self.weight, self.bias, self.rowscale, self.rng_state)
        out, total, mean, rstd = op("norm_fwd", overload)(
            *tensors, EPS, self.dropout_p, self.is_rms, self.offset, self.changes, False
        )
        differs = self.changes and (
            self.rowscale is not None or self.rng_state is not None or total.dtype != self.x.dtype
        )
        stored = total if self.changes else self.x
        dx, dresidual, dweight, dbias = op("norm_bwd", overload)(
            self.dout,
            stored,
            self.dsum if self.changes else None,
            self.weight,
            self.rowscale,
            self.rng_state,
            mean,
            rstd,
            self.dropout_p,
            self.is_rms,
            self.offset,
            self.bias is not None,
            differs,
        )
        found = {"out": out, "dx": dx, "dweight": dweight}
        if self.changes:
            found |= {"sum": total, "dresidual": dresidual if differs else dx}
        if self.bias is not None:
            found["dbias"] = dbias
        return found

    def plain(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The same through autograd; dtype None: in the types of the inputs."""

        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype or t.dtype).detach().requires_grad_()

        x, residual, weight, bias = map(leaf, (self.x, self.residual, self.weight, self.bias))
        assert x is not None
        assert weight is not None
        total = x
        if self.rowscale is not None:
            total = total * self.rowscale.to(total.dtype)[:, None]
        if self.rng_state is not None:
            mask = _philox.row_keep_mask(self.rng_state, *x.shape, self.dropout_p)
            total = total * mask.to(total.dtype) * _philox.row_keep_scale(self.dropout_p)
        if residual is not None:
            total = total + residual
        out = normalised(total, weight + self.offset, bias, self.is_rms)
        found = {"out": out}
        loss = (out * self.dout.to(out.dtype)).sum()
        if self.changes:
            found["sum"] = total
            loss = loss + (total * self.dsum.to(total.dtype)).sum()
        leaves = {"dx": x, "dweight": weight}
        leaves |= {} if bias is None else {"dbias": bias}
        leaves |= {} if residual is None else {"dresidual": residual}
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return found | dict(zip(leaves, gradients, strict=True))

    def check(self, overload: str) -> None:
        found, exact, plain = self.compute(overload), self.plain(F64), self.plain(None)
        for name, x in plain.items():
            assert found[name].is_contiguous()
            # One rounding of the sum, which plain operations escape where results are few; sums
            # over the rows round in fp32 in an order of their own.
            unit = max(1e-5, torch.finfo(self.x.dtype).eps)
            slack = unit * max(1.0, exact[name].abs().max().item())
            assert_close_2x(found[name], exact[name], x.to(found[name].dtype), slack, name)


@pytest.mark.parametrize("overload", ["default", "tiled"])
@pytest.mark.parametrize("size", SIZES)
@KINDS
def test_sizes(size: int, is_rms: bool, device: str, overload: str) -> None:
    for rows, dtype in itertools.product((1, 37), (F16, BF16, F32)):
        # A row of one element has no variance: the rounding of its sum would be the whole result.
        sum_dtype = dtype if size > 1 else None
        Case(device, rows, size, dtype, is_rms=is_rms, sum_dtype=sum_dtype).check(overload)


@pytest.mark.parametrize("overload", ["default", "tiled"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"sum_dtype": F32},
        {"sum_dtype": F32, "weight_dtype": F32},
        {"weight_dtype": F32, "offset": 1.0},
        {"dropout_p": 0.3},
        {"dropout_p": 0.1, "sum_dtype": BF16},
        {"dropout_p": 0.5, "sum_dtype": F32, "rowscale": True, "weight_dtype": F32},
        {"rowscale": True},
    ],
    ids=lambda options: ",".join(map(str, options)) or "plain",
)
@KINDS
def test_options(options: dict[str, Any], is_rms: bool, device: str, overload: str) -> None:
    for rows, size in ((53, 264), (5, 1001)):
        Case(device, rows, size, BF16, is_rms=is_rms, **options).check(overload)


@KINDS
def test_large_rows(is_rms: bool, device: str) -> None:
    """More than one row a CTA takes at once, and rows of whole CTAs."""
    for rows, size in ((3000, 64), (700, 1536), (9, 5120), (5, 8192), (300, 12288)):
        Case(device, rows, size, F32, is_rms=is_rms, sum_dtype=F32).check("default")


def test_large_mean(device: str) -> None:
    """The variance does not cancel."""
    x = 1e3 + randn(40, 512, dtype=F32, device=device).detach()
    weight, bias = torch.ones(512, device=device), torch.zeros(512, device=device)
    out = op("norm_fwd", "default")(
        x, None, weight, bias, None, None, EPS, 0.0, False, 0.0, False, False
    )[0]
    assert_equals(out, F.layer_norm(x.double(), (512,), None, None, EPS), 1e-3)


def test_gradients_are_reproducible(device: str) -> None:
    case = Case(device, 999, 768, BF16, sum_dtype=F32, dropout_p=0.2)
    first = case.compute("default")
    for _ in range(3):
        for name, x in case.compute("default").items():
            assert torch.equal(x, first[name]), name


def test_dropout_is_the_same_everywhere(device: str) -> None:
    case = Case(device, 70, 1001, F32, sum_dtype=F32, dropout_p=0.25, is_rms=True, bias=False)
    case.residual.zero_()
    total = case.compute("default")["sum"]
    mask = _philox.row_keep_mask(rng_state(), 70, 1001, 0.25)
    assert torch.equal(total.cpu() != 0, mask)
    assert abs(mask.double().mean().item() - 0.75) < 0.01
    assert not torch.equal(mask, _philox.row_keep_mask(rng_state(offset=6), 70, 1001, 0.25))
    assert not torch.equal(mask[0], mask[1])


def test_thresholds() -> None:
    assert _philox.row_keep_threshold(0.0) == 65536
    assert _philox.row_keep_threshold(0.25) == 49152
    assert _philox.row_keep_threshold(1.0 - 1e-9) == 1
    assert _philox.row_keep_scale(0.5) == 2.0


def test_strides_and_alignment(device: str) -> None:
    """Rows apart from each other, and rows that begin anywhere."""
    wide = randn(20, 300, dtype=BF16, device=device).detach()
    weight = randn(128, dtype=BF16, device=device).detach()
    for x in (wide[:, :128], wide[:, 8:136], wide[:, 3:131], wide[::2, :128]):
        arguments = (None, weight, None, None, None, EPS, 0.0, True, 0.0, False, False)
        out, _, mean, rstd = op("norm_fwd", "default")(x, *arguments)
        copied = op("norm_fwd", "default")(x.contiguous(), *arguments)
        assert_equals(out, copied[0], 1e-2)
        gradients = (
            op("norm_bwd", "default")(
                y, y, None, weight, None, None, mean, rstd, 0.0, True, 0.0, False, False
            )
            for y in (x, x.contiguous())
        )
        for found, expected in zip(*gradients, strict=True):
            assert_equals(found, expected, 1e-1)


def test_infinite_and_empty(device: str) -> None:
    weight = torch.ones(16, device=device)
    arguments = (None, weight, None, None, None, EPS, 0.0, True, 0.0, False, False)
    x = torch.zeros(3, 16, device=device)
    x[1, 3] = torch.nan
    out = op("norm_fwd", "default")(x, *arguments)[0]
    assert out[1].isnan().all()
    assert (out[::2] == 0).all()
    assert op("norm_fwd", "default")(x[:0], *arguments)[0].shape == (0, 16)


# ---- the function with its gradient -----------------------------------------------------------


@KINDS
def test_function(is_rms: bool, device: str) -> None:
    """Which gradients there are, and that an unused result has none."""
    x, residual = (randn(6, 24, dtype=F32, device=device) for _ in range(2))
    weight, bias = (randn(24, dtype=F32, device=device) for _ in range(2))
    options = _kernels.NormOptions(EPS, 0.0, is_rms, 0.0, True, False)
    leaves = (x, residual, weight, bias)
    out, total = _kernels.norm(x, residual, weight, bias, None, options)
    assert total is not None
    expected_sum = x.double() + residual.double()
    expected = normalised(expected_sum, weight.double(), bias.double(), is_rms)
    for ours, exact in (
        (out.sin().sum() + total.cos().sum(), expected.sin().sum() + expected_sum.cos().sum()),
        (out.sin().sum(), expected.sin().sum()),
        (total.cos().sum(), expected_sum.cos().sum()),
    ):
        pair = (
            torch.autograd.grad(y, leaves, retain_graph=True, allow_unused=True)
            for y in (ours, exact)
        )
        for found, wanted in zip(*pair, strict=True):
            assert_equals(found, torch.zeros_like(found) if wanted is None else wanted, 1e-5)
    with torch.no_grad():
        again = _kernels.norm(x, None, weight, None, None, options._replace(return_sum=False))
    assert again[1] is None
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative of a norm"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool, device: str) -> None:
    torch._dynamo.reset()

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        options = _kernels.NormOptions(EPS, 0.0, True, 1.0, True, False)
        out, total = _kernels.norm(2 * x, residual, weight, None, None, options)
        assert total is not None
        return out * total

    inputs = [randn(*shape, dtype=F32, device=device) for shape in ((6, 24), (6, 24), (24,))]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    pairs = (
        torch.autograd.grad(function(*inputs).square().sum(), inputs)
        for function in (compiled, model)
    )
    for found, expected in zip(*pairs, strict=True):
        assert_equals(found, expected, 1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@KINDS
def test_public_function_compiled(
    is_rms: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to the ops, on every device, in one graph; weights of two types become fp32."""
    monkeypatch.setattr(_kernels, "takes", lambda x: True)
    torch._dynamo.reset()

    def model(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        out, total = norms.layer_norm_fn(
            x, weight, bias, residual, eps=EPS, rowscale=scale, prenorm=True, is_rms_norm=is_rms
        )
        first, same = norms.layer_norm_fn(x, weight, None, prenorm=True, is_rms_norm=is_rms)
        return out.float() * total + first + same

    x, residual = (randn(2, 3, 24, dtype=t, device=device) for t in (dtype, F32))
    weight, bias = (randn(24, dtype=t, device=device) for t in (dtype, F32))
    inputs = (x, residual, weight, bias)
    scale = torch.rand(2, 3, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [
        (y := function(*inputs, scale), *torch.autograd.grad(y.square().sum(), inputs))
        for function in (compiled, model)
    ]
    monkeypatch.setattr(_kernels, "takes", lambda x: False)
    y = model(*inputs, scale)
    plain = (y, *torch.autograd.grad(y.square().sum(), inputs))
    for found, eager, expected in zip(*results, plain, strict=True):
        limit = expected.abs().max().item()
        assert_equals(found, eager, 1e-5 * limit)
        assert_equals(found, expected, (1e-5 if dtype == F32 else 2e-2) * limit)


def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take CUDA tensors of their types, none while PyTorch operations are asked for."""
    monkeypatch.setattr(_kernels, "_LOADED", True)
    monkeypatch.delenv("FLASH_ATTN_EXT_BACKEND", raising=False)

    def tensor(dtype: torch.dtype, is_cuda: bool = True) -> Any:
        return SimpleNamespace(dtype=dtype, is_cuda=is_cuda)

    assert all(_kernels.takes(tensor(dtype)) for dtype in (F16, BF16, F32))
    assert not _kernels.takes(tensor(F64))
    assert not _kernels.takes(tensor(BF16, is_cuda=False))
    monkeypatch.setenv("FLASH_ATTN_EXT_BACKEND", "tiled")
    assert not _kernels.takes(tensor(BF16))


# ---- the public functions on a GPU ------------------------------------------------------------


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    require(NEEDS_CUDA)
    require(NEEDS_LIBRARY)
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")


@pytest.mark.parametrize("arch", ["", "sm80"])
@KINDS
def test_public_functions(
    is_rms: bool, arch: str, no_fallback: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels against the PyTorch operations of the same function, gradients and types too."""
    monkeypatch.setenv("FLASH_ATTN_EXT_ARCH", arch)
    for dtype, residual_dtype, options in (
        (BF16, None, {}),
        (BF16, None, {"prenorm": True}),
        (F16, F16, {"prenorm": True, "zero_centered_weight": True}),
        (BF16, F32, {"prenorm": True}),
        (BF16, None, {"prenorm": True, "residual_in_fp32": True}),
        (F32, F32, {}),
    ):
        x = randn(4, 9, 320, dtype=dtype, device="cuda")
        residual = None
        if residual_dtype is not None:
            residual = randn(4, 9, 320, dtype=residual_dtype, device="cuda")
        weight, bias = (randn(320, dtype=F32, device="cuda") for _ in range(2))
        leaves = [t for t in (x, residual, weight, bias) if t is not None]
        results = []
        for takes in (_kernels.takes, lambda x: False):
            monkeypatch.setattr(_kernels, "takes", takes)
            found = norms.layer_norm_fn(
                x, weight, bias, residual, eps=EPS, is_rms_norm=is_rms, **options
            )
            found = found if isinstance(found, tuple) else (found,)
            loss = sum(y.float().sin().sum() for y in found)
            results.append((*found, *torch.autograd.grad(loss, leaves)))
            monkeypatch.undo()
            monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
            monkeypatch.setenv("FLASH_ATTN_EXT_ARCH", arch)
        for ours, plain in zip(*results, strict=True):
            assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
            # The kernels' backward starts from the rounded sum, and so do gradients in fp32.
            unit = max(1e-4, 4 * torch.finfo(dtype).eps)
            scale = max(1.0, plain.abs().max().item())
            assert_equals(ours, plain, unit * scale)


def test_seeds_and_autocast(no_fallback: None) -> None:
    x = randn(64, 256, dtype=BF16, device="cuda").detach()
    weight = torch.ones(256, device="cuda")
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        with torch.autocast("cuda", BF16):
            runs.append(norms.rms_norm_fn(x, weight, None, dropout_p=0.5, prenorm=True))
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])
    assert runs[0][0].dtype == BF16
    assert abs((runs[0][1] == 0).float().mean().item() - 0.5) < 0.05


def test_more_than_2_31_elements(no_fallback: None) -> None:
    require(NEEDS_GPU_MEMORY)
    rows, size = 2**19 + 3, 4096
    x = torch.randn(rows, size, dtype=BF16, device="cuda")
    weight = torch.ones(size, dtype=BF16, device="cuda")
    options = (weight, None, None, None, EPS, 0.0, True, 0.0, False, False)
    out, _, mean, rstd = op("norm_fwd", "default")(x, None, *options)
    for part in (slice(0, 3), slice(rows - 3, rows)):
        expected = F.rms_norm(x[part].double(), (size,), None, EPS)
        assert_equals(out[part], expected, 2e-2)
    dx = op("norm_bwd", "default")(
        x, x, None, weight, None, None, mean, rstd, 0.0, True, 0.0, False, False
    )[0]
    last = x[-3:].double().requires_grad_()
    F.rms_norm(last, (size,), None, EPS).backward(x[-3:].double())
    assert_equals(dx[-3:], last.grad, 2e-2)
