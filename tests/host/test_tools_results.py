"""benchmarks/common.py on the CPU, and tools/render_results.py on what it writes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attention_calls
import bench_attention
import bench_small_kernels
import bench_training
import common
import plot_attention
import pytest
import render_results
import torch
from helpers import needs_module, require

from flash_attn_ext.bench import measure
from flash_attn_ext.examples import gpt
from flash_attn_ext.reference import visible_keys

CPU = torch.device("cpu")


def test_median_ms_alternates() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.002)

    slow_ms, fast_ms = common.median_ms(
        [slow, lambda: calls.append("fast")], CPU, repetitions=3, warmup=1
    )
    assert calls == ["slow", "fast"] * 4
    assert slow_ms >= 2 > fast_ms >= 0


def test_copy_of_moves_that_many_bytes() -> None:
    target = common.copy_of(1 << 16, CPU)()
    assert isinstance(target, torch.Tensor)
    assert 2 * target.numel() * target.element_size() == 1 << 16
    assert target.unique().numel() > 1000  # random, not constant


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("CPU AMD EPYC 9B14", "amd-epyc-9b14"),
        ("", "unknown"),
    ],
)
def test_device_slug(name: str, slug: str) -> None:
    assert common.device_slug(name) == slug


def test_environment() -> None:
    env = common.environment(CPU)
    assert env["torch"] == torch.__version__
    assert env["device"].startswith("CPU ")
    assert env["commit"]
    assert not any("/" in argument for argument in env["command"].split()[:2])


def test_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_output", lambda *command: None)
    assert common.environment(CPU)["commit"]


@pytest.mark.parametrize(
    ("only", "ops"),
    [
        *((op, {op}) for op in ("combine", "bwd_preprocess", "rotary", "append_kv")),
        ("norm_case", {"norm_fwd", "norm_bwd"}),
        ("cross_entropy", {"cross_entropy_fwd", "cross_entropy_bwd"}),
    ],
)
def test_small_kernels_end_to_end(
    only: str,
    ops: set[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_small_kernels, "SEQLEN", 64)
    monkeypatch.setattr(bench_small_kernels, "MAX_POSITION", 128)
    path = tmp_path / "results" / "cpu" / "small_kernels.json"
    arguments = ["--device", "cpu", "--megabytes", "0", "--repetitions", "1", "--only", only]
    monkeypatch.setattr(bench_small_kernels.Setup, "batch_size", lambda self, each: 1)
    assert bench_small_kernels.main([*arguments, "--out", str(path)]) == 0
    content = json.loads(path.read_text())
    assert {row["op"].rstrip("_") for row in content["rows"]} == ops
    for row in content["rows"]:
        gb_per_s = row["num_bytes"] / row["ms"] / 1e6
        assert row["gb_per_s"] == pytest.approx(gb_per_s, rel=1e-2, abs=0.06)
        assert 0 < row["fraction_of_copy"]
    of_companions = only in ("norm_case", "cross_entropy")
    markdown = render_results.generate(path.parents[1], of_companions=of_companions)
    assert sum(markdown.count(f"| `{op}") for op in ops) == len(content["rows"])
    assert ("times torch's" in markdown) is of_companions
    rest = render_results.generate(path.parents[1], of_companions=not of_companions)
    assert rest == render_results.EMPTY
    assert content["environment"]["device"] in markdown

    arguments += ["--out", str(path.parent)]  # where the file has this name
    assert bench_small_kernels.main([*arguments, "--assert", "1e9"]) == 1
    assert "below" in capsys.readouterr().out


def test_rows_read_more_than_they_claim_to_need() -> None:
    """The promise of the benchmark: every case reads at least the asked number of bytes."""
    setup = bench_small_kernels.Setup(CPU, 10_000)
    assert setup.batch_size(3_000) * 3_000 >= 10_000
    assert setup.batch_size(20_000) == 1


def test_render_without_results(tmp_path: Path) -> None:
    assert render_results.generate(tmp_path) == render_results.EMPTY
    assert render_results.companions(tmp_path) == render_results.EMPTY
    assert render_results.attention_summary(tmp_path) == render_results.EMPTY_ATTENTION
    assert render_results.attention_results(tmp_path) == render_results.EMPTY_ATTENTION
    assert render_results.attention_pictures(tmp_path) == render_results.EMPTY_ATTENTION


def test_every_document_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have a block, and then the pictures."""
    texts = {
        "README.md": "<!-- begin: benchmarks -->\n<!-- end: benchmarks -->\n",
        "docs/deep/a.md": "<!-- begin: attention-summary -->\n<!-- end: attention-summary -->\n",
        "docs/b.md": "no block\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(render_results, "ROOT", tmp_path)
    for name in ("benchmarks", "attention-summary"):
        monkeypatch.setitem(render_results.GENERATORS, name, lambda name=name: f"new {name}")
    drawn: list[list[str]] = []
    monkeypatch.setattr(
        render_results.subprocess,
        "run",
        lambda command, **_: drawn.append(command[2:]) or SimpleNamespace(returncode=0),
    )
    assert [path.name for path in render_results.documents()] == ["README.md", "a.md"]
    assert render_results.main(["--check"]) == 1
    assert render_results.main([str(tmp_path / "docs/deep/a.md")]) == 0
    assert render_results.main(["--check"]) == 1  # README.md still
    assert render_results.main([]) == render_results.main(["--check"]) == 0
    assert "new attention-summary" in (tmp_path / "docs/deep/a.md").read_text()
    assert drawn == [["--check"], ["--check"], [], ["--check"]]


def test_work_of_attention_problems() -> None:
    full = attention_calls.Problem(2, 100, 3, 3, 64)
    assert full.flops() == 4 * 2 * 3 * 64 * 100**2
    causal = dataclasses.replace(full, causal=True)
    assert causal.flops() == full.flops() / 2
    for mask, window in [(False, (10, 5)), (True, (10, 0)), (False, (-1, 7)), (False, (3, -1))]:
        problem = dataclasses.replace(full, causal=mask, window=window)
        assert problem.pairs() == visible_keys(100, 100, window).sum().item()
    packed = attention_calls.PackedProblem((10, 90), 3, 64)
    assert packed.flops() == 4 * 3 * 64 * (10**2 + 90**2) / 2


def small_problem(batch_size: int, seqlen: int, *sizes: int, **options: Any) -> Any:
    """In place of bench_attention.Problem: one sequence of at most 48 tokens."""
    return attention_calls.Problem(1, min(seqlen, 48), *sizes, **options)


def test_attention_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every section on the CPU, then its tables and pictures."""
    packed = {"two": attention_calls.PackedProblem((16, 40), 2, 32)}
    monkeypatch.setattr(bench_attention, "packed_problems", lambda: packed)
    monkeypatch.setattr(bench_attention, "Problem", small_problem)
    monkeypatch.setattr(bench_attention, "HIDDEN", 128)
    monkeypatch.setattr(bench_attention, "host_us", lambda call, device: len([call()]) * 1.5)
    monkeypatch.setenv("FLASH_ATTN_EXT_SMEM_KB", "99")
    folder = tmp_path / "results" / "cpu"
    arguments = ["--device", "cpu", "--seqlens", "32,48", "--head-dims", "64", "--repetitions", "1"]
    assert bench_attention.main([*arguments, "--out", str(folder)]) == 0
    for section in bench_attention.SECTIONS:
        content = json.loads((folder / f"attention_{section}_99kb.json").read_text())
        assert content["environment"]["switches"]["FLASH_ATTN_EXT_SMEM_KB"] == "99"
        assert bool(content["rows"]) == (section != "memory")  # which needs CUDA
    assert "x FlashAttention-2" in capsys.readouterr().out

    sizes = dataclasses.asdict(small_problem(1, 48, 2, 2, 64))
    peaks = {"ours": 1 << 20, "ours_deterministic": 1 << 20, "sdpa_flash": 3 << 20, "plain": None}
    path = folder / "attention_memory_99kb.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "rows": [{**sizes, "peak_bytes": peaks}]}))
    text = render_results.attention_results(folder.parent)
    for section in bench_attention.SECTIONS:
        assert f"## {render_results.ATTENTION[section][0]}" in text
    assert "| 48 | 1 | 1 | 3 | - |" in text
    assert "FLASH_ATTN_EXT_SMEM_KB=99 " in text
    assert "| fwd | 64 | full |" in text.split("back to back for 0.15 s")[1]
    assert "| sdpa_flash | 1 | 48 | 16 | 128 | causal |" in text
    assert "| fwd | 64 | causal |" in render_results.attention_summary(folder.parent)

    require(needs_module("matplotlib"))
    assert plot_attention.main([str(folder)]) == 0
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "attention_dense_99kb.png",
        "attention_memory_99kb.png",
        "attention_step_99kb.png",
    ]
    assert f"![TFLOP/s of attention over the length, {content['environment']['device']}]" in (
        render_results.attention_pictures(folder.parent)
    )

    check = [str(folder), "--check"]
    assert plot_attention.main(check) == 0
    path.write_text(path.read_text().replace("3145728", "3145729"))
    assert plot_attention.main(check) == 1
    assert "attention_memory_99kb.png: stale, drawn from other" in capsys.readouterr().out
    assert plot_attention.main([str(folder)]) == plot_attention.main(check) == 0
    (folder / "attention_dense_99kb.png").unlink()
    assert plot_attention.main(check) == 1
    assert "attention_dense_99kb.png: missing" in capsys.readouterr().out


def cache_row(number: str, **sizes: Any) -> dict[str, Any]:
    """A row of bench_decode.py; `number` is its unit."""
    row = {"batch_size": 2, "num_heads": 32, "num_heads_kv": 8, "seqlen_k": 1024, "seqlen_q": 1}
    measured = {"us": {"ours": 12.34, "sdpa_cudnn": 20.0}, number: {"ours": 900, "sdpa_cudnn": 500}}
    return {**row, "page_size": None, **sizes, **measured}


def test_decode_tables(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "h100"
    environment = {
        **{"device": "NVIDIA H100", "flash_attn_ext": "0.1.0", "commit": "abc", "torch": "2.11.0"},
        **{"date": "2026-11-27", "command": "python bench_decode.py", "dtype": "bfloat16"},
    }
    paged = cache_row("gbps", page_size=64)
    paged["us"].pop("sdpa_cudnn")
    rates = {"ours": 883.2, "sdpa": 692.0}
    rows = {
        "decode": [cache_row("gbps"), cache_row("gbps", num_heads=64), paged],
        "lengths": [
            cache_row("gbps", head_dim=64, drawn_lengths=True),
            cache_row("gbps", head_dim=128, drawn_lengths=False),
        ],
        "prefill": [cache_row("tflops", seqlen_q=256)],
        "generate": [
            {"batch_size": 1, "prompt": 8000, "new_tokens": 64, "cuda_graph": True}
            | {"tokens_per_second": rates, "same_tokens": 0.997}
        ],
        "host": [{"call": "op kvcache_fwd", "us": 5.25}],
    }
    for section, of_section in rows.items():
        common.write_results(folder / f"decode_{section}.json", environment, of_section)
    text = render_results.decode_results(folder.parent)
    assert "| 32 / 8 | 1024 | 2 | 1 | - | 12.3 us, 900 | 20.0 us, 500 |" in text
    assert "| 32 / 8 | 1024 | 2 | 1 | 64 | 12.3 us, 900 | - |" in text
    assert "| 64 | 32 / 8 | 1 to 1024 | 2 | 1 | - | 12.3 us, 900 | 20.0 us, 500 |" in text
    assert "| 128 | 32 / 8 | 1024 | 2 | 1 | - | 12.3 us, 900 | 20.0 us, 500 |" in text
    assert "sdpa_cudnn, TFLOP/s |" in text.split("## Chunked prefill")[1]
    assert "| replayed | 1 | 8000 | 883 | 692 | 100% |" in text
    assert "| op kvcache_fwd | 5.2 |" in text
    assert render_results.decode_results(tmp_path) == render_results.EMPTY_DECODE
    require(needs_module("matplotlib"))
    assert plot_attention.main([str(folder)]) == 0
    assert [path.name for path in folder.glob("*.png")] == ["decode_decode.png"]


def curves(ours: float) -> Callable[..., Iterator[float]]:
    """Losses of which those of `ours` differ by that much; two runs of the same by 0.01."""
    runs = itertools.count()
    return lambda name, *_: iter([5.0, 4.0 + next(runs) % 4 // 2 * 0.01 + ours * (name == "ours")])


def test_training_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--device", "cpu", "--steps", "2", "--repeats", "2"]
    folder = tmp_path / "results" / "cpu"
    for difference, status in ((1.0, 1), (0.001, 0)):
        monkeypatch.setattr(bench_training, "losses", curves(difference))
        assert bench_training.main([*arguments, "--out", str(folder)]) == status
    rows = json.loads((folder / "attention_training.json").read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["bf16", "fp16"]
    text = render_results.attention_results(folder.parent)
    assert "## The demo's GPT, trained with either attention" in text
    assert f"| bf16 | 2 | 4.0060 | 4.0050 | {rows[0]['distance']:.4f} | 0.0100 |" in text
    require(needs_module("matplotlib"))
    assert plot_attention.main([str(folder)]) == 0
    assert (folder / "attention_training.png").exists()


@pytest.mark.parametrize("name", ["ours", "sdpa"])
def test_training_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "flash_attn_func", gpt.flash_attn_func)  # put back behind the test
    first, second = bench_training.losses(name, "bf16", CPU, steps=2, quick=True)
    assert 4 < second < first < 7  # ln 256 = 5.5


def test_attention_asserts_the_dense_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_attention, "Problem", small_problem)
    monkeypatch.setattr(bench_attention, "HIDDEN", 64)
    arguments = ["--device", "cpu", "--seqlens", "32", "--head-dims", "64", "--repetitions", "1"]
    arguments += ["--sections", "dense", "--passes", "fwd", "--out", str(tmp_path)]
    assert bench_attention.main([*arguments, "--assert-row", "1e-9"]) == 0
    assert bench_attention.main([*arguments, "--assert-row", "1e9"]) == 1
    assert bench_attention.main([*arguments, "--assert-mean", "1e9"]) == 1
    assert "on average" in capsys.readouterr().out
