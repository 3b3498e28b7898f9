"""The demo, end to end with tiny sizes, and its parts."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import needs_module, require

from flash_attn_ext.cli import _compare, demo, main
from flash_attn_ext.cli._compare import Measurement

MEASUREMENTS = [
    Measurement("flash_attn_ext", 64, 1.0, 2.0),
    Measurement("flash_attn_ext", 128, 2.0, 4.0),
    Measurement("plain PyTorch", 64, 1.5, 3.0),
    Measurement("plain PyTorch", 128, None, None, "out of memory"),
]


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures in this process: a child costs seconds for the import of torch."""
    monkeypatch.setattr(_compare, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(_compare, "measure_in_child", _compare.measure)


@pytest.mark.usefixtures("no_children")
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require(needs_module("matplotlib"))
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(tmp_path / "new")]) == 0
    out, err = capsys.readouterr()
    assert "tokens/s" in out
    assert "def main(args):" in out
    assert "bytes/s through the KV cache" in out
    assert "plain PyTorch ms" in out
    assert "highest resident memory" in out
    assert "training" in err
    assert (tmp_path / "new" / demo.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_children")
def test_json_and_the_loss_falls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["demo", "--quick", "--json", "--device", "cpu", "--seed", "3", "--out", str(tmp_path)]
    )
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert document["learned"] is True
    assert document["losses"][0] > 5
    assert document["train_loss"] < document["losses"][0] - 1
    assert document["held_out_loss"] < document["held_out_loss_before"] - 1
    assert document["tokens_per_second"] > 0
    assert document["sample"].startswith("def main(args):")
    assert {m["provider"] for m in document["comparison"]} == set(_compare.PROVIDERS)


@pytest.mark.usefixtures("no_children")
def test_a_model_that_does_not_learn_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "evaluate", lambda *args: 5.5)
    monkeypatch.setattr(demo, "save_picture", missing_matplotlib)
    words = ["demo", "--quick", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert "did not learn: loss 5.50 after 5.50" in err
    assert "No picture: matplotlib is not installed. Fix: pip install matplotlib" in out


@pytest.mark.parametrize("steps", ["0", "-1", "x"])
def test_impossible_steps(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--steps", steps])
    assert stopped.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["demo", "--device", "cuda"]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert demo._printable("a\n\x1b[31m") == "a\n�[31m"


def missing_matplotlib(*args: object) -> None:
    raise ImportError("No module named 'matplotlib'")


def test_a_child_process_measures() -> None:
    found = list(_compare.measure_in_child("plain PyTorch", "cpu", [32, 16]))
    assert [m.seqlen for m in found] == [16, 32]
    assert all(m.error is None and m.milliseconds and m.peak_mb is not None for m in found)


def test_a_child_that_dies_names_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compare, "_CHILD", "import sys; sys.exit(9)")
    found = list(_compare.measure_in_child("plain PyTorch", "cpu", [32, 16]))
    assert found == [Measurement("plain PyTorch", 16, None, None, "the process ended with code 9")]


def test_the_childs_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare.main(["PyTorch SDPA", "cpu", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["seqlen"] == 16


def test_out_of_memory_ends_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.size(1) == 128:
            raise torch.OutOfMemoryError
        return q * k * v

    monkeypatch.setitem(_compare.PROVIDERS, "hungry", attention)
    monkeypatch.setattr(_compare, "TIMED_SECONDS", 0.0)
    found = list(_compare.measure("hungry", "cpu", [256, 128, 64]))
    assert [(m.seqlen, m.error) for m in found] == [(64, None), (128, "out of memory")]


def test_a_slow_provider_gets_no_longer_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compare, "MAX_SECONDS_PER_CALL", 0.0)
    assert len(list(_compare.measure("plain PyTorch", "cpu", [16, 32, 64]))) == 1


def test_every_provider_computes_the_same() -> None:
    q, k, v = (torch.randn(1, 40, 2, 16, dtype=torch.float64) for _ in range(3))
    outs = [attention(q, k, v) for attention in _compare.PROVIDERS.values()]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_the_table_shows_what_is_missing() -> None:
    table = demo._comparison_table(MEASUREMENTS)
    assert "out of memory" in table
    assert table.splitlines()[2].split()[:3] == ["64", "1.0", "2.0"]


def test_the_picture_leaves_out_what_is_missing(tmp_path: Path) -> None:
    require(needs_module("matplotlib"))
    demo.save_picture(tmp_path / "a.png", [5.0, 4.0], MEASUREMENTS, "title")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_progress_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with demo.Progress("work", 40) as progress:
        for step in range(40):
            progress.step(f"step {step}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "work 4/40  step 3"
    assert lines[-1] == "work 40/40  step 39"


def test_resident_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    from_proc = _compare._process_bytes("VmHWM")
    monkeypatch.setattr(_compare, "Path", lambda name: Path("/no/such/file"))
    from_rusage = _compare._process_bytes("VmHWM")
    assert from_proc > 10_000_000
    assert from_rusage > 10_000_000


def test_the_mark_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_attn_ext.cli import _output

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert _output.mark("error") == "X"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert _output.mark("error") == "✘"


@pytest.mark.parametrize("faster", [1, 2])
def test_the_faster_number_of_threads_is_taken(
    faster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(provider: str, device: str, seqlens: list[int]) -> Iterator[Measurement]:
        milliseconds = 1.0 if torch.get_num_threads() == faster else 2.0
        yield Measurement(provider, seqlens[0], milliseconds, 1.0)

    monkeypatch.setattr(_compare, "measure", measure)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with demo._fastest_threads():
            assert torch.get_num_threads() == faster
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
