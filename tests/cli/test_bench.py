"""The bench command on the CPU, its checks against the definition, and the adapters of peers."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_equals, needs_module, require
from torch import Tensor

import flash_attn_ext as fa
from flash_attn_ext.bench import check, pictures, providers, runs
from flash_attn_ext.bench.problems import (
    AnyProblem,
    DecodeProblem,
    PackedProblem,
    Problem,
    backward,
)
from flash_attn_ext.cli import bench, main
from flash_attn_ext.reference import attention_reference

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--seqlens", "32,48", "--head-dims", "32", "--heads", "4"]
SMALL += ["--repetitions", "1"]
SETUP = runs.Setup(CPU, torch.float32, 1)


@pytest.mark.parametrize("kind", runs.KINDS)
def test_end_to_end(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", kind, *SMALL, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "flash_attn_ext (tiled PyTorch operations)" in out
    assert "left out: flash_attn" in out or "flash-attn 2" in out
    assert "\r" not in err  # no progress bar where there is no terminal
    document = json.loads((tmp_path / f"bench_{kind}.json").read_text())
    environment, rows = document["environment"], document["rows"]
    assert environment["kind"] == kind
    metric = runs.METRIC.get(kind, "tflops")
    peer = "sdpa_loop" if kind == "varlen" else "sdpa_math"
    for row in rows:
        assert not row["wrong"]
        assert row[metric]["ours"] > 0
        assert row[metric][peer] > 0
        assert set(row["errors"]["ours"]) == (
            {"out"} if row["pass"] in ("fwd", "decode") else {"dq", "dk", "dv"}
        )
    ceiling = {"decode": "copy_gb_per_s", "memory": "threads"}.get(kind, "matmul_tflops")
    assert environment[ceiling] > 0
    page = (tmp_path / f"bench_{kind}.html").read_text()
    assert rows[0]["problem"] in page
    require(needs_module("matplotlib"))
    assert (tmp_path / f"bench_{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert 'src="data:image/png;base64,' in page


def test_json_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--vs", "sdpa_math", "--batch", "3", "--heads-kv", "2", "--causal", "--json"]
    assert main(["bench", "bwd", *SMALL, *words]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["batch_size"], row["num_heads_kv"], row["causal"]) for row in rows] == [
        (3, 2, True),
        (3, 2, True),
    ]
    assert set(rows[0]["ms"]) == {"ours", "sdpa_math"}


def ignores_the_mask(problem: Problem, tensors: list[Tensor]) -> Any:
    return providers.ours(dataclasses.replace(problem, causal=False), tensors)


def test_a_wrong_peer_is_not_fast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(providers.DENSE, "xformers", ignores_the_mask)
    words = ["--vs", "xformers,sdpa_math", "--out", str(tmp_path)]
    assert main(["bench", "fwd", *SMALL, *words]) == 0
    out, _ = capsys.readouterr()
    full, causal = json.loads((tmp_path / "bench_fwd.json").read_text())["rows"][1:3]
    assert "xformers" in full["ms"]
    assert "xformers" not in causal["ms"]
    assert causal["wrong"]["xformers"].startswith("out is off by ")
    assert runs.ratio(causal, "xformers") is None
    assert out.count("WRONG, not compared: xFormers in fwd") == 2
    assert "<td class=wrong>WRONG</td>" in (tmp_path / "bench_fwd.html").read_text()


def test_wrong_results_of_our_own_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(providers.DENSE, "ours", ignores_the_mask)
    assert main(["bench", "fwd", *SMALL, "--vs", "sdpa_math"]) == 1
    assert main(["bench", "memory", *SMALL, "--vs", "sdpa_math"]) == 1
    assert "WRONG, not compared: flash_attn_ext" in capsys.readouterr().out


def test_impossible_questions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "decode", *SMALL, "--vs", "nobody"]) == 2
    assert "--vs: got nobody; bench decode knows ours, sdpa_flash" in capsys.readouterr().err
    monkeypatch.setenv("FLASH_ATTN_EXT_FALLBACK", "error")
    assert main(["bench", "fwd", *SMALL, "--heads-kv", "3"]) == 2
    assert "heads" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "fwd", "--seqlens", "0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "fwd", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(document: Any) -> bytes:
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(pictures, "png", missing)
    words = ["--vs", "sdpa_math", "--out", str(tmp_path / "new")]
    assert main(["bench", "fwd", *SMALL, *words]) == 0
    assert "No picture: matplotlib is not installed. Fix: pip" in capsys.readouterr().err
    assert "<img" not in (tmp_path / "new" / "bench_fwd.html").read_text()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "bench_fwd.html",
        "bench_fwd.json",
    ]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = runs.Progress(4)
    for text in ("one", "two"):
        progress.step(text)
    progress.close()
    assert "\r[######..................] 1/4 two" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


def test_only_kernels_are_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_ATTN_EXT_FALLBACK", raising=False)
    with bench._fallback("cuda"):
        assert bench.os.environ["FLASH_ATTN_EXT_FALLBACK"] == "error"
    assert "FLASH_ATTN_EXT_FALLBACK" not in bench.os.environ


PROBLEMS: list[AnyProblem] = [
    Problem(2, 20, 4, 2, 16, causal=True),
    Problem(1, 20, 4, 4, 16),
    Problem(1, 20, 2, 1, 16, window=(3, 2)),
    PackedProblem((5, 9, 20), 3, 16),
    DecodeProblem(2, 24, 4, 2, 16),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_what_results_are_checked_against(
    problem: AnyProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as the definition, block by block; and a small error is found."""
    monkeypatch.setattr(check, "_BLOCK_ELEMENTS", 100)  # a few rows each
    tensors = problem.tensors(CPU, torch.float64)
    dout = torch.randn_like(tensors[0])
    q, k, v = (x.transpose(0, 1)[None] for x in check.head(problem, tensors))
    window = getattr(problem, "window", (-1, -1))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention_reference(*leaves, causal=problem.causal, window_size=window).out
    (dout_head,) = check.head(problem, [dout])
    gradients = torch.autograd.grad(out, leaves, dout_head.transpose(0, 1)[None])
    forward, back = check.Judge(problem, tensors), check.Judge(problem, tensors, dout)
    assert_equals(forward.exact["out"], out[0].transpose(0, 1), 1e-12)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert_equals(back.exact[name], gradient[0].transpose(0, 1), 1e-12, name)

    shape = tensors[0]
    assert forward.verdict({"out": 0.0}) is None
    assert "out is off by" in str(forward.verdict(forward.errors([torch.zeros_like(shape)])))
    assert forward.errors([torch.full_like(shape, torch.nan)])["out"] == torch.inf
    assert forward.errors([shape.detach()[..., :8]])["out"] == torch.inf
    assert forward.verdict({"out": float("nan")}) is not None


def test_providers_of_pytorch_agree() -> None:
    """Every provider that this machine has, against the definition, with grouped heads."""
    for kind, problem in (
        ("bwd", Problem(2, 24, 4, 2, 16, causal=True)),
        ("varlen", PackedProblem((5, 9, 20), 2, 16)),
        ("decode", DecodeProblem(2, 32, 4, 2, 16)),
    ):
        names = [n for n in runs.table_of(kind) if n != "flex_attention"]
        row = runs.timed(SETUP, kind, "bwd" if kind == "bwd" else "fwd", problem, names)
        assert not row["wrong"]
        assert {"ours", "sdpa_loop" if kind == "varlen" else "sdpa_math"} <= set(row["ms"])
    plain = providers.plain(problem := Problem(2, 24, 4, 2, 16), problem.tensors(CPU, SETUP.dtype))
    assert plain().shape == (2, 24, 4, 16)


def test_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled here: the same function as plain operations."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(providers, "_compiled_flex", lambda: flex_attention)
    for kind, problem in (
        ("fwd", Problem(2, 24, 4, 2, 16, causal=True)),
        ("fwd", Problem(1, 24, 4, 4, 16)),
        ("varlen", PackedProblem((5, 9, 20), 2, 16)),
        ("decode", DecodeProblem(2, 32, 4, 2, 16)),
    ):
        row = runs.timed(SETUP, kind, "fwd", problem, ["ours", "flex_attention"])
        assert "flex_attention" in row["ms"], row


# ---- peers that are not installed: modules with their signatures --------------------------------


def flash_attn_module(name: str) -> ModuleType:
    """The functions of flash-attn that are called, with the results of the definition."""
    module = ModuleType(name)

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, None]:
        return fa.flash_attn_func(q, k, v, causal=causal), None

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
    ) -> Tensor:
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return fa.flash_attn_varlen_func(q, k, v, *ends, causal=causal)

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, causal: bool
    ) -> Tensor:
        return fa.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, causal=causal
        )

    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(module, function.__name__, function)
    return module


def xformers_ops() -> ModuleType:
    module = ModuleType("xformers.ops")

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        assert q.shape[2:4] == k.shape[2:4]  # no broadcasting of heads
        shape = q.shape
        q, k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (q, k, v))
        if isinstance(attn_bias, list):
            parts = [x.split(attn_bias, 1) for x in (q, k, v)]
            outs = [fa.flash_attn_func(*part, causal=True) for part in zip(*parts, strict=True)]
            return torch.cat(outs, 1).view(shape)
        return fa.flash_attn_func(q, k, v, causal=attn_bias == "causal").view(shape)

    module.memory_efficient_attention = memory_efficient_attention
    module.LowerTriangularMask = lambda: "causal"
    mask = SimpleNamespace(from_seqlens=list)
    module.fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalCausalMask=mask))
    return module


class PrefillWrapper:
    """flashinfer.BatchPrefillWithRaggedKVCacheWrapper."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD"

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        *,
        causal: bool,
        q_data_type: torch.dtype,
    ) -> None:
        self.ends, self.causal = qo_indptr, causal

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        longest = int(self.ends.diff().max())
        ends = (self.ends, self.ends, longest, longest)
        return fa.flash_attn_varlen_func(q, k, v, *ends, causal=self.causal)


class DecodeWrapper:
    """flashinfer.BatchDecodeWithPagedKVCacheWrapper."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD"

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        batch_size = last_page_len.shape[0]
        self.table = indices.view(batch_size, -1)
        self.lengths = (indptr.diff() - 1) * page_size + last_page_len

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        out: Any = fa.flash_attn_with_kvcache(
            q[:, None], *cache, cache_seqlens=self.lengths, page_table=self.table
        )
        return out[:, 0]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "flash_attn": flash_attn_module("flash_attn"),
        "flash_attn.cute": flash_attn_module("flash_attn.cute"),
        "flash_attn_interface": flash_attn_module("flash_attn_interface"),
        "xformers": ModuleType("xformers"),
        "xformers.ops": xformers_ops(),
        "flashinfer": ModuleType("flashinfer"),
    }
    modules["flashinfer"].BatchPrefillWithRaggedKVCacheWrapper = PrefillWrapper
    modules["flashinfer"].BatchDecodeWithPagedKVCacheWrapper = DecodeWrapper
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


OTHERS = ["flash_attn", "flash_attn_3", "flash_attn_4", "xformers", "flashinfer"]


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("fwd", Problem(2, 24, 4, 2, 16, causal=True)),
        ("fwd", Problem(2, 24, 4, 4, 16)),
        ("bwd", Problem(2, 24, 4, 1, 16, causal=True)),
        ("varlen", PackedProblem((5, 9, 20), 2, 16)),
        ("decode", DecodeProblem(2, 32, 4, 2, 16)),
    ],
    ids=str,
)
def test_adapters(kind: str, problem: AnyProblem) -> None:
    names = [name for name in OTHERS if name in runs.table_of(kind)]
    row = runs.timed(SETUP, kind, "fwd" if kind == "varlen" else kind, problem, names)
    assert not row["wrong"]
    if kind == "bwd":
        assert row["missing"].pop("flashinfer") == "FlashInfer has no backward"
    assert not row["missing"]


@pytest.mark.usefixtures("peers")
def test_what_adapters_refuse() -> None:
    problem = Problem(1, 24, 2, 2, 16, window=(4, 0))
    tensors = problem.tensors(CPU, torch.float32)
    for name in ("sdpa_math", "xformers", "flex_attention", "flashinfer"):
        with pytest.raises(RuntimeError, match="has no window"):
            providers.DENSE[name](problem, tensors)
    decode = DecodeProblem(1, 20, 2, 2, 16)
    with pytest.raises(ValueError, match="seqlen_k=20: expected a multiple of 16"):
        providers.DECODE["flashinfer"](decode, decode.tensors(CPU, torch.float32))


def test_an_alias_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.__flash_attn_ext__ = True
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    row = runs.timed(SETUP, "fwd", "fwd", Problem(1, 8, 1, 1, 16), ["ours", "flash_attn"])
    assert "is flash_attn_ext's alias" in row["missing"]["flash_attn"]


def test_out_of_memory_is_told() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert runs._refused("ours", error) == "out of memory"
    assert runs._refused("xformers", RuntimeError("first\nsecond")) == "first"
    assert runs._refused("xformers", AssertionError()) == "AssertionError"
    with pytest.raises(RuntimeError, match="ours is broken"):
        runs._refused("ours", RuntimeError("ours is broken"))


def test_backward_can_be_repeated() -> None:
    problem = Problem(1, 8, 1, 1, 16)
    tensors = problem.tensors(CPU, torch.float64)
    call = backward(providers.ours(problem, tensors), tensors)
    for first, second in zip(call(), call(), strict=True):
        assert torch.equal(first, second)
