"""benchmarks/common.py on the CPU, and tools/render_results.py on what it writes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import bench_small_kernels
import common
import pytest
import render_results
import torch

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
    monkeypatch.setattr(common, "_output", lambda *command: None)
    assert common.environment(CPU)["commit"]


@pytest.mark.parametrize("op", ["combine", "bwd_preprocess", "rotary", "append_kv"])
def test_small_kernels_end_to_end(
    op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_small_kernels, "SEQLEN", 64)
    monkeypatch.setattr(bench_small_kernels, "MAX_POSITION", 128)
    path = tmp_path / "results" / "cpu" / "small_kernels.json"
    arguments = ["--device", "cpu", "--megabytes", "0", "--repetitions", "1", "--only", op]
    monkeypatch.setattr(bench_small_kernels.Setup, "batch_size", lambda self, each: 1)
    assert bench_small_kernels.main([*arguments, "--out", str(path)]) == 0
    content = json.loads(path.read_text())
    assert {row["op"].rstrip("_") for row in content["rows"]} == {op}
    for row in content["rows"]:
        gb_per_s = row["num_bytes"] / row["ms"] / 1e6
        assert row["gb_per_s"] == pytest.approx(gb_per_s, rel=1e-2, abs=0.06)
        assert 0 < row["fraction_of_copy"]
    markdown = render_results.generate(path.parents[1])
    assert markdown.count(f"| `{op}") == len(content["rows"])
    assert content["environment"]["device"] in markdown

    assert bench_small_kernels.main([*arguments, "--out", str(path), "--assert", "1e9"]) == 1
    assert "below" in capsys.readouterr().out


def test_rows_read_more_than_they_claim_to_need() -> None:
    """The promise of the benchmark: every case reads at least the asked number of bytes."""
    setup = bench_small_kernels.Setup(CPU, 10_000)
    assert setup.batch_size(3_000) * 3_000 >= 10_000
    assert setup.batch_size(20_000) == 1


def test_render_without_results(tmp_path: Path) -> None:
    assert render_results.generate(tmp_path) == render_results.EMPTY
