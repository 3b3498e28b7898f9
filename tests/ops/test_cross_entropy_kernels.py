"""The cross-entropy ops and their gradient on every device: kernels, and the tiled backend."""

from __future__ import annotations

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
)
from torch import Tensor

from flash_attn_ext import UnsupportedError
from flash_attn_ext.ops import _kernels
from flash_attn_ext.ops.cross_entropy import CrossEntropyLoss, cross_entropy_loss

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
IGNORED = -100
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "scale": {"logit_scale": 0.3},
    "negative_scale": {"logit_scale": -1.2},
    "z_loss": {"lse_square_scale": 1e-2},
    "everything": {"label_smoothing": 0.2, "logit_scale": 1.7, "lse_square_scale": 0.1},
}
# Fewer than a vector, rows that begin anywhere, more than the vectors of one step of a CTA.
VOCABULARIES = (1, 5, 64, 1003, 8192, 32768 + 8, 50257)


def problem(
    rows: int, vocabulary: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which some are ignored, and the gradient of the loss."""
    logits = (3 * randn(rows, vocabulary, dtype=F64)).to(dtype).to(device).detach()
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::4] = IGNORED
    return logits, labels.to(device), torch.rand(rows).to(device)


def losses(logits: Tensor, labels: Tensor, options: dict[str, float]) -> tuple[Tensor, Tensor]:
    """loss and z_loss by torch's own function, in the type of the logits."""
    scores = logits * options.get("logit_scale", 1.0)
    z_loss = options.get("lse_square_scale", 0.0) * scores.logsumexp(-1).square()
    z_loss = z_loss.masked_fill(labels == IGNORED, 0.0)
    loss = F.cross_entropy(
        scores,
        labels,
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    return loss + z_loss, z_loss


def arguments(options: dict[str, float]) -> tuple[Any, ...]:
    defaults = {"label_smoothing": 0.0, "logit_scale": 1.0, "lse_square_scale": 0.0}
    return (*(defaults | options).values(), IGNORED)


def check(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    options: dict[str, float],
    device: str,
    overload: str,
) -> None:
    logits, labels, dloss = problem(rows, vocabulary, dtype, device)
    tail = arguments(options)
    loss, z_loss, lse = op("cross_entropy_fwd", overload)(logits, labels, None, *tail)
    dlogits = op("cross_entropy_bwd", overload)(dloss, logits, labels, lse, *tail)
    exact_logits = logits.double().requires_grad_()
    exact, exact_z = losses(exact_logits, labels, options)
    (exact_gradient,) = torch.autograd.grad((exact * dloss.double()).sum(), exact_logits)
    plain_logits = logits.clone().requires_grad_()
    plain, plain_z = losses(plain_logits.float(), labels, options)
    (plain_gradient,) = torch.autograd.grad((plain * dloss).sum(), plain_logits)
    assert loss.dtype == z_loss.dtype == lse.dtype == F32
    # ex2 and lg2 are approximations to 2^-22; torch's float32 functions are exact to an ulp.
    slack = 3e-6 * max(1.0, exact.abs().max().item())
    assert_close_2x(loss, exact, plain, slack, "loss")
    assert_close_2x(z_loss, exact_z, plain_z, slack, "z_loss")
    assert_close_2x(dlogits, exact_gradient, plain_gradient, 3e-6, "dlogits")
    assert (dlogits[labels == IGNORED] == 0).all()

    copied = logits.clone()
    op("cross_entropy_bwd_", overload)(dloss, copied, labels, lse, *tail)
    assert torch.equal(copied, dlogits)


@pytest.mark.parametrize("overload", ["default", "tiled"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_vocabularies(vocabulary: int, dtype: torch.dtype, device: str, overload: str) -> None:
    check(9, vocabulary, dtype, OPTIONS["everything"], device, overload)


@pytest.mark.parametrize("overload", ["default", "tiled"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, float], device: str, overload: str) -> None:
    check(50, 777, BF16, options, device, overload)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_given_lse(options: dict[str, float], device: str) -> None:
    logits, labels, _ = problem(20, 300, F32, device)
    tail = arguments(options)
    results = op("cross_entropy_fwd", "default")(logits, labels, None, *tail)
    shifted = torch.where(labels == IGNORED, 0.0, results[2] + 0.25)
    given = op("cross_entropy_fwd", "default")(logits, labels, shifted, *tail)
    assert torch.equal(given[2], shifted)
    assert given[2].data_ptr() != shifted.data_ptr()
    z_scale = options.get("lse_square_scale", 0.0)
    expected = results[0] + (0.25 + z_scale * (shifted**2 - results[2] ** 2)) * (labels != IGNORED)
    assert_equals(given[0], expected, 1e-4)


def test_strides(device: str) -> None:
    """Rows apart from each other, labels and gradients with strides, an expanded gradient."""
    wide, labels, _ = problem(12, 500, BF16, device)
    spread = torch.stack((labels, labels), -1)[:, 0].to(torch.int32)
    dloss = torch.ones((), device=device).expand(12)
    tail = arguments({})
    for logits in (wide[:, :400], wide[:, 1:401], wide[:, 3:403]):
        kept = torch.where(spread >= 400, IGNORED, spread)
        loss, _, lse = op("cross_entropy_fwd", "default")(logits, kept, None, *tail)
        expected = losses(logits.double(), kept.long(), {})[0]
        assert_equals(loss, expected, 1e-4)
        found = op("cross_entropy_bwd", "default")(dloss, logits, kept, lse, *tail)
        copied = op("cross_entropy_bwd", "default")(dloss, logits.contiguous(), kept, lse, *tail)
        assert found.is_contiguous()
        assert torch.equal(found, copied)


def test_masked_logits(device: str) -> None:
    """-inf logits have no probability, whole vectors and threads of them too."""
    logits, labels, dloss = problem(6, 40_000, F32, device)
    logits[:, :35_000] = -torch.inf
    labels = torch.where(labels == IGNORED, labels, labels % 5000 + 35_000)
    loss, _, lse = op("cross_entropy_fwd", "default")(logits, labels, None, *arguments({}))
    expected = losses(logits[:, 35_000:].double(), (labels - 35_000).clamp(min=IGNORED), {})[0]
    assert_equals(loss, expected, 1e-4)
    dlogits = op("cross_entropy_bwd", "default")(dloss, logits, labels, lse, *arguments({}))
    assert (dlogits[:, :35_000] == 0).all()
    assert dlogits.isfinite().all()


def test_no_rows(device: str) -> None:
    logits, labels, _ = problem(0, 8, F32, device)
    loss, _, lse = op("cross_entropy_fwd", "default")(logits, labels, None, *arguments({}))
    assert loss.shape == lse.shape == (0,)


# ---- the function with its gradient -----------------------------------------------------------


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_function(inplace_backward: bool, device: str) -> None:
    logits, labels, dloss = problem(11, 100, F32, device)
    logits.requires_grad_()
    options = _kernels.LossOptions(*arguments(OPTIONS["everything"]))
    loss, z_loss = _kernels.cross_entropy(logits, labels, None, options, inplace_backward)
    assert loss.requires_grad
    assert not z_loss.requires_grad
    expected = losses(logits.double(), labels, OPTIONS["everything"])[0]
    (exact,) = torch.autograd.grad((expected * dloss).sum(), logits)
    (gradient,) = torch.autograd.grad((loss * dloss).sum(), logits)
    assert_equals(gradient, exact, 1e-5)
    assert (gradient.data_ptr() == logits.data_ptr()) is inplace_backward
    if not inplace_backward:
        loss, _ = _kernels.cross_entropy(logits, labels, None, options, False)
        (gradient,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
        with pytest.raises(UnsupportedError, match="second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiled(dynamic: bool, inplace_backward: bool, device: str) -> None:
    torch._dynamo.reset()
    x, labels, _ = problem(6, 40, F32, device)
    x.requires_grad_()

    def model(x: Tensor) -> Tensor:
        options = _kernels.LossOptions(*arguments(OPTIONS["everything"]))
        return _kernels.cross_entropy(2 * x, labels, None, options, inplace_backward)[0]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found, expected = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, model))
    assert_equals(found, expected, 1e-5)


def test_public_function_compiled(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to the ops, on every device, in one graph."""
    monkeypatch.setattr(_kernels, "takes", lambda x: True)
    torch._dynamo.reset()
    x, labels, _ = problem(6, 40, F32, device)
    x.requires_grad_()
    lse = x.detach().logsumexp(-1).double()

    def model(x: Tensor) -> Tensor:
        loss, z_loss = cross_entropy_loss(
            x, labels.to(torch.int16), lse, lse_square_scale=0.1, ignore_index=IGNORED
        )
        return loss + z_loss

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = sum(losses(x.double(), labels, {"lse_square_scale": 0.1}))
    assert_equals(compiled(x), expected, 1e-5)
    found, eager = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, model))
    assert_equals(found, eager, 1e-5)


# ---- the public function on a GPU -------------------------------------------------------------


@pytest.fixture(params=["", "sm80"])
def no_fallback(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    require(NEEDS_CUDA)
    require(NEEDS_LIBRARY)
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    monkeypatch.setenv("FLASH_ATTN_EXT_ARCH", request.param)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_public_function(options: dict[str, float], no_fallback: None) -> None:
    """Kernels against the PyTorch operations of the same function on the CPU."""
    logits, labels, dloss = problem(33, 2001, BF16, "cpu")
    results = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        loss, z_loss = cross_entropy_loss(leaf, labels.to(device), **options)
        (gradient,) = torch.autograd.grad((loss * dloss.to(device)).sum(), leaf)
        results.append([x.cpu() for x in (loss, z_loss, gradient)])
    for name, ours, plain in zip(("loss", "z_loss", "dlogits"), *reversed(results), strict=True):
        unit = 1e-2 if name == "dlogits" else 1e-5
        assert_equals(ours, plain, unit * max(1.0, plain.abs().max().item()), name)


def test_module_in_place(no_fallback: None) -> None:
    logits, labels, _ = problem(64, 512, BF16, "cuda")
    hidden = logits.clone().requires_grad_()
    layer = CrossEntropyLoss(inplace_backward=True)
    layer(hidden * 1, labels).backward()
    expected = logits.double().requires_grad_()
    F.cross_entropy(expected, labels).backward()
    assert_equals(hidden.grad, expected.grad, 1e-4)


def test_label_outside(no_fallback: None) -> None:
    """Loud, and nothing outside the row is read."""
    logits, labels, dloss = problem(4, 16, F32, "cuda")
    labels[:] = torch.tensor([0, 16, -1, 15])
    loss, _, lse = op("cross_entropy_fwd", "default")(logits, labels, None, *arguments({}))
    dlogits = op("cross_entropy_bwd", "default")(dloss, logits, labels, lse, *arguments({}))
    for x in (loss, dlogits[:, 0]):
        assert x.isnan().tolist() == [False, True, True, False]


def test_more_than_2_31_elements(no_fallback: None) -> None:
    require(NEEDS_GPU_MEMORY)
    rows, vocabulary = 2**14 + 100, 2**17 + 1
    logits = torch.empty(rows, vocabulary, dtype=BF16, device="cuda")
    logits[-3:] = torch.randn(3, vocabulary, device="cuda")
    labels = torch.full((rows,), IGNORED, device="cuda")
    labels[-3:] = vocabulary - 1
    loss, _, lse = op("cross_entropy_fwd", "default")(logits, labels, None, *arguments({}))
    exact = logits[-3:].double().requires_grad_()
    expected = F.cross_entropy(exact, labels[-3:], reduction="none")
    assert_equals(loss[-3:], expected, 1e-4)
    dloss = torch.ones(rows, device="cuda")
    op("cross_entropy_bwd_", "default")(dloss, logits, labels, lse, *arguments({}))
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert_equals(logits[-3:], gradient, 4e-3)
    assert (logits[:100] == 0).all()
