"""The public functions over sequences of one length: signatures, options, return values."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import NEEDS_CUDA, assert_equals, cu_seqlens, int32, randn, require
from torch import Tensor

import flash_attn_ext as fa
from flash_attn_ext.reference import attention_reference

pytestmark = pytest.mark.filterwarnings("ignore::flash_attn_ext.FallbackWarning")

OPTIONS = [
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
    "alibi_slopes",
    "deterministic",
    "return_attn_probs",
]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
POSITIONAL = {  # flash-attn 2.8
    "flash_attn_func": ["q", "k", "v", *OPTIONS],
    "flash_attn_kvpacked_func": ["q", "kv", *OPTIONS],
    "flash_attn_qkvpacked_func": ["qkv", *OPTIONS],
    "flash_attn_varlen_func": ["q", "k", "v", *LENGTHS, *OPTIONS, "block_table"],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *LENGTHS, *OPTIONS],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *OPTIONS],
    "flash_attn_with_kvcache": [
        *["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens"],
        *["cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale", "causal"],
        *["window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits"],
        "return_softmax_lse",
    ],
    "flash_attn_combine": ["out_partial", "lse_partial", "out", "out_dtype"],
    "get_scheduler_metadata": [
        *["batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim"],
        *["cache_seqlens", "qkv_dtype", "headdim_v", "cu_seqlens_q", "cu_seqlens_k_new"],
        *["cache_leftpad", "page_size", "max_seqlen_k_new", "causal", "window_size"],
        *["attention_chunk", "has_softcap", "num_splits", "pack_gqa", "sm_margin"],
    ],
}
FLASH_ATTN_3 = {
    *["qv", "q_descale", "k_descale", "v_descale", "attention_chunk", "num_splits"],
    *["pack_gqa", "sm_margin"],
}
KEYWORDS = {  # flash-attn 3 and vLLM's fork
    "flash_attn_func": {*FLASH_ATTN_3, "s_aux", "learnable_sink", "out", "return_softmax_lse"},
    "flash_attn_qkvpacked_func": {*(FLASH_ATTN_3 - {"qv"}), "num_heads_q"},
    "flash_attn_varlen_func": {
        *FLASH_ATTN_3,
        *["seqused_q", "seqused_k", "page_table", "scheduler_metadata", "out", "s_aux"],
        *["learnable_sink", "return_softmax_lse"],
    },
    "flash_attn_with_kvcache": {
        *FLASH_ATTN_3,
        *["page_table", "cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q", "rotary_seqlens"],
        *["scheduler_metadata", "s_aux", "return_softmax_lse"],
    },
}


@pytest.mark.parametrize("name", list(POSITIONAL))
def test_positional_order_is_that_of_flash_attn(name: str) -> None:
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == POSITIONAL[name]
    # transformers reads signatures to learn what is supported: nothing may hide in **kwargs.
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


@pytest.mark.parametrize("name", list(KEYWORDS))
def test_keywords_of_other_versions(name: str) -> None:
    assert set(inspect.signature(getattr(fa, name)).parameters) >= KEYWORDS[name]


@pytest.mark.parametrize("name", [name for name in fa.__all__ if name.startswith(("flash", "get"))])
def test_every_parameter_is_documented(name: str) -> None:
    function = getattr(fa, name)
    doc = inspect.getdoc(function)
    assert doc is not None
    if "Args:" in doc:
        for parameter in inspect.signature(function).parameters:
            assert f"\n    {parameter}: " in doc


def test_public_names() -> None:
    assert dir(fa) == sorted(fa.__all__)
    for name in fa.__all__:
        assert getattr(fa, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'flash_attention'"):
        fa.flash_attention  # noqa: B018


def test_import_is_light() -> None:
    """No CUDA call, no optional package, nothing of the backend before it is needed."""
    program = (
        "import sys, torch; before = set(sys.modules); import flash_attn_ext;"
        "print(*sorted(set(sys.modules) - before)); print(torch.cuda.is_initialized())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules, is_initialized = result.stdout.splitlines()
    assert is_initialized == "False"
    packages = ("numpy", "matplotlib", "tqdm", "transformers", "triton")
    assert not [m for m in modules.split() if m.split(".")[0] in packages]
    ours = ("torch_tiled", "explain")
    assert not [m for m in modules.split() if m.rsplit(".", 1)[-1] in ours]
    assert "torch.utils.flop_counter" not in modules.split()


# ---- options ----------------------------------------------------------------------------------


def inputs(
    device: str, dtype: torch.dtype = torch.float64, seqlens: tuple[int, int] = (5, 7)
) -> tuple[Tensor, Tensor, Tensor]:
    """q of 4 heads, k and v of 2, head_dim 8, head_dim_v 12."""
    shapes = ((2, seqlens[0], 4, 8), (2, seqlens[1], 2, 8), (2, seqlens[1], 2, 12))
    q, k, v = (randn(*shape, dtype=dtype, device=device).detach() for shape in shapes)
    return q, k, v


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"softmax_scale": 0.7},
        {"window_size": (2, 1)},
        {"window_size": (-1, 0)},
        {"window_size": (3, -1)},
        {"causal": True, "window_size": (2, 5)},
        {"softcap": 1.5},
    ],
)
@pytest.mark.parametrize("seqlens", [(5, 7), (7, 5), (1, 4), (4, 0), (0, 4)])
def test_options(options: dict[str, Any], seqlens: tuple[int, int], device: str) -> None:
    q, k, v = inputs(device, seqlens=seqlens)
    out, lse = fa.flash_attn_func(q, k, v, return_softmax_lse=True, **options)
    expected = attention_reference(q, k, v, **options)
    assert_equals(out, expected.out, 1e-12)
    assert_equals(lse, expected.lse, 1e-12, "lse")


@pytest.mark.parametrize("batched", [False, True])
def test_alibi(batched: bool, device: str) -> None:
    q, k, v = inputs(device)
    slopes = torch.rand(2, 8, device=device)[:, ::2]
    slopes = slopes if batched else slopes[0]
    out, lse = fa.flash_attn_func(
        q, k, v, alibi_slopes=slopes, causal=True, return_softmax_lse=True
    )
    expected = attention_reference(q, k, v, alibi_slopes=slopes, causal=True)
    assert_equals(out, expected.out, 1e-12)
    assert_equals(lse, expected.lse, 1e-12, "lse")


def test_unbounded_windows_are_one_thing(device: str) -> None:
    q, k, v = inputs(device)
    expected = fa.flash_attn_func(q, k, v)
    for window in (None, (None, None), (-1, -1), (-5, None), [None, -2]):
        assert torch.equal(fa.flash_attn_func(q, k, v, window_size=window), expected)
    causal = fa.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(fa.flash_attn_func(q, k, v, window_size=(None, 0)), causal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_results(dtype: torch.dtype, device: str) -> None:
    q, k, v = inputs(device, dtype)
    out, lse, dmask = fa.flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.dtype, lse.dtype, dmask.dtype) == (dtype, torch.float32, dtype)
    assert out.shape == (2, 5, 4, 12)
    assert lse.shape == (2, 4, 5)
    assert dmask.shape == (0,)
    assert isinstance(fa.flash_attn_func(q, k, v), Tensor)
    assert_equals(out, attention_reference(q, k, v).out, 1e-5 if dtype == torch.float32 else 2e-2)


def test_dropout_mask(device: str) -> None:
    q, k, v = inputs(device)
    torch.manual_seed(3)
    out, lse, dmask = fa.flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
    assert dmask.shape == (2, 4, 128, 128)
    probabilities = dmask[:, :, :5, :7]
    is_kept = ~probabilities.signbit()
    expected = attention_reference(q, k, v, dropout_p=0.5, dropout_mask=is_kept)
    assert_equals(out, expected.out, 1e-12)
    assert_equals(lse, expected.lse, 1e-12, "lse")
    assert_equals(probabilities.abs(), expected.probs, 1e-12, "probabilities")
    torch.manual_seed(3)
    assert torch.equal(fa.flash_attn_func(q, k, v, dropout_p=0.5), out)
    assert not torch.equal(fa.flash_attn_func(q, k, v, dropout_p=0.5), out)


def test_packed_forms_equal_the_plain_one(device: str) -> None:
    qkv = randn(2, 5, 3, 4, 8, device=device).detach()
    options = {"causal": True, "softcap": 2.0, "return_softmax_lse": True}
    out, lse = fa.flash_attn_func(*qkv.unbind(2), **options)
    for packed in (
        fa.flash_attn_qkvpacked_func(qkv, **options),
        fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options),
        fa.flash_attn_qkvpacked_func(qkv.flatten(2, 3), num_heads_q=4, **options),
    ):
        assert torch.equal(packed[0], out)
        assert torch.equal(packed[1], lse)


def test_grouped_heads_in_one_tensor(device: str) -> None:
    q, k, v = (randn(2, 5, heads, 8, device=device).detach() for heads in (4, 2, 2))
    packed = fa.flash_attn_qkvpacked_func(torch.cat([q, k, v], dim=2), num_heads_q=4)
    assert torch.equal(packed, fa.flash_attn_func(q, k, v))


def test_any_strides(device: str) -> None:
    q, k, v = inputs(device)
    expected = fa.flash_attn_func(q, k, v, causal=True)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert_equals(fa.flash_attn_func(*heads_first, causal=True), expected, 1e-12)
    dim_strided = (torch.stack([x, x], dim=-1)[..., 0] for x in (q, k, v))
    assert_equals(fa.flash_attn_func(*dim_strided, causal=True), expected, 1e-12)


@pytest.mark.parametrize("head_dim", [1, 3, 20, 256])
def test_head_dims(head_dim: int, device: str) -> None:
    q, k, v = (randn(1, n, 2, head_dim, device=device).detach() for n in (3, 4, 4))
    assert_equals(fa.flash_attn_func(q, k, v), attention_reference(q, k, v).out, 1e-12)


def test_out_is_written_and_returned(device: str) -> None:
    q, k, v = inputs(device)
    buffer = torch.full((2, 5, 4, 30), torch.nan, dtype=q.dtype, device=device)
    out = buffer[..., 7:19]
    result, lse = fa.flash_attn_func(q, k, v, out=out, return_softmax_lse=True)
    assert result is out
    expected = attention_reference(q, k, v)
    assert_equals(out, expected.out, 1e-12)
    assert_equals(lse, expected.lse, 1e-12)
    assert buffer[..., :7].isnan().all()
    assert buffer[..., 19:].isnan().all()


# ---- sinks ------------------------------------------------------------------------------------


def with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention with one more column of scores, whose value is 0."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    visible = torch.ones_like(scores[0, 0]).tril(k.shape[2] - q.shape[2]).bool()
    scores = scores.masked_fill(~visible, -torch.inf)
    column = sink.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    scores = torch.cat([scores, column], dim=-1)
    out = torch.softmax(scores, dim=-1)[..., :-1] @ v
    return out.transpose(1, 2), torch.logsumexp(scores, dim=-1)


@pytest.mark.parametrize("word", ["s_aux", "learnable_sink"])
@pytest.mark.parametrize("seqlens", [(5, 7), (7, 5)])
def test_sinks(word: str, seqlens: tuple[int, int], device: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(device, seqlens=seqlens))
    sink = randn(4, dtype=torch.float32, device=device)
    leaves = (q, k, v, sink)
    actual = fa.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True, **{word: sink})
    expected = with_sink(*leaves)
    for a, b, name in zip(actual, expected, ("out", "lse"), strict=True):
        assert_equals(a, b, 1e-12, name)
    weights = [torch.randn_like(x) for x in expected]
    for a, b, name in zip(
        torch.autograd.grad(actual, leaves, weights),
        torch.autograd.grad(expected, leaves, weights),
        ("dq", "dk", "dv", "dsink"),
        strict=True,
    ):
        assert_equals(a, b, 1e-6 if name == "dsink" else 1e-11, name)


def test_sink_of_minus_infinity_is_none(device: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(device, seqlens=(7, 5)))
    sink = torch.full((4,), -torch.inf, device=device, requires_grad=True)
    actual = fa.flash_attn_func(q, k, v, causal=True, s_aux=sink, return_softmax_lse=True)
    expected = fa.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    assert_equals(actual[0], expected[0], 1e-12)
    assert_equals(actual[1], expected[1], 1e-12)
    for a, b in zip(
        torch.autograd.grad(actual[0].sum(), (q, k, v, sink)),
        (*torch.autograd.grad(expected[0].sum(), (q, k, v)), torch.zeros_like(sink)),
        strict=True,
    ):
        assert_equals(a, b, 1e-12)


def test_sink_into_a_given_buffer(device: str) -> None:
    q, k, v = inputs(device)
    sink = randn(4, dtype=torch.float32, device=device).detach()
    out = torch.empty(2, 5, 4, 12, dtype=q.dtype, device=device)
    assert fa.flash_attn_func(q, k, v, s_aux=sink, out=out) is out
    assert_equals(out, fa.flash_attn_func(q, k, v, s_aux=sink), 1e-12)


# ---- CUDA -------------------------------------------------------------------------------------


def gpu_calls() -> dict[str, Callable[[], Tensor]]:
    """One call of each function, its inputs made beforehand."""

    def x(*shape: int) -> Tensor:
        return randn(*shape, dtype=torch.bfloat16, device="cuda")

    q, k, v = x(2, 5, 4, 64), x(2, 7, 2, 64), x(2, 7, 2, 64)
    packed = q.detach().flatten(0, 1), k.detach().flatten(0, 1), v.detach().flatten(0, 1)
    starts = cu_seqlens([5, 5], "cuda"), cu_seqlens([7, 7], "cuda")
    cache = torch.zeros(6, 4, 2, 64, dtype=q.dtype, device="cuda")
    table, lengths = int32([0, 1, 2, 3, 4, 5], "cuda").view(2, 3), int32([3, 1], "cuda")
    cos, sin = (torch.rand(12, 16, dtype=q.dtype, device="cuda") for _ in "cs")

    def trained() -> Tensor:
        out = fa.flash_attn_func(q, k, v, causal=True, dropout_p=0.2)
        return torch.autograd.grad(out, q, torch.ones_like(out))[0]

    def decoded() -> Tensor:
        return fa.flash_attn_with_kvcache(
            q.detach(),
            cache,
            cache,
            k.detach()[:, :5],
            v.detach()[:, :5],
            cos,
            sin,
            lengths,
            block_table=table,
            causal=True,
        )

    return {
        "train": trained,
        "varlen": lambda: fa.flash_attn_varlen_func(*packed, *starts, 5, 7, causal=True),
        "decode": decoded,
    }


@pytest.mark.parametrize("name", ["train", "varlen", "decode"])
def test_no_synchronisation(name: str) -> None:
    require(NEEDS_CUDA)
    call = gpu_calls()[name]
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["train", "varlen", "decode"])
def test_cuda_graph(name: str) -> None:
    require(NEEDS_CUDA)
    call = gpu_calls()[name]
    expected = call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.fill_(torch.nan)
    graph.replay()
    first = captured.clone()
    assert first.isfinite().all()
    if name == "train":  # every replay draws a new dropout mask
        graph.replay()
        assert not torch.equal(captured, first)
    else:
        assert torch.equal(first, expected)
