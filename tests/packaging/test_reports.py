"""The launcher, the reading of ptxas, the progress line and the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools import measured, ptxas, report
from build_tools.log import framed, say
from build_tools.progress import Progress, duration, remaining_seconds

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2fa7combineEPf' for 'sm_80'
ptxas info    : Function properties for _ZN2fa7combineEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN2fa6rotaryEPf' for 'sm_90a'
ptxas info    : Function properties for _ZN2fa6rotaryEPf
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
"""


def test_parse_log() -> None:
    combine, rotary = ptxas.parse_log(LOG)
    assert combine == ptxas.KernelUsage("_ZN2fa7combineEPf", "sm_80", registers=42, smem_bytes=2048)
    assert rotary == ptxas.KernelUsage(
        "_ZN2fa6rotaryEPf",
        "sm_90a",
        registers=255,
        stack_bytes=16,
        spill_store_bytes=24,
        spill_load_bytes=32,
    )
    assert ptxas.parse_log("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == []


def test_read_logs_demangles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "sm80_combine.log"
    log.write_text(LOG)
    (tmp_path / "sm80_empty.log").write_text("nothing\n")
    monkeypatch.setattr(ptxas.shutil, "which", lambda name: None)
    assert ptxas.read_logs([log])["sm80_combine"][0].name == "_ZN2fa7combineEPf"
    filt = tmp_path / "c++filt"
    filt.write_text("#!/bin/sh\necho banner\nsed s/^/nice:/\n")  # one line too many: not trusted
    filt.chmod(0o755)
    monkeypatch.setattr(ptxas.shutil, "which", lambda name: str(filt))
    assert ptxas.demangled(["_Za"]) == {"_Za": "_Za"}
    filt.write_text("#!/bin/sh\nsed s/^/nice:/\n")
    assert ptxas.demangled(["_Za", "_Zb"]) == {"_Za": "nice:_Za", "_Zb": "nice:_Zb"}
    assert list(ptxas.read_logs(tmp_path.glob("*.log"))) == ["sm80_combine"]


def test_grave_warnings(tmp_path: Path) -> None:
    assert len(ptxas.grave_warnings(LOG)) == 1
    log = tmp_path / "sm90_fwd.log"
    log.write_text(LOG)
    assert report.read_warnings([log])[0].startswith("sm90_fwd: ptxas info    : (C7510)")


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    path = tmp_path / "cc"
    path.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done\n'
        'echo "$WORDS"\n[ -z "$FAIL" ] || exit 3\necho object > "$out"\n'
    )
    path.chmod(0o755)
    return path


def test_launcher_records_a_compilation(
    tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORDS", "ptxas info")
    target = tmp_path / "a.o"
    command = [str(compiler), "-c", "a.cu", "-o", str(target), "-O3"]
    assert measured.run(str(tmp_path / "logs"), False, command) == 0
    record = json.loads((tmp_path / "a.o.json").read_text())
    assert set(record) == {"seconds", "cpu_seconds", "peak_mb"}
    assert record["seconds"] >= 0
    assert record["peak_mb"] >= 0
    assert (tmp_path / "logs" / "a.log").read_text() == "ptxas info\n"
    assert capfd.readouterr().err == ""
    costs = report.read_costs({"_sm80/a": tmp_path / "a.o.json", "_C/gone": tmp_path / "b.o.json"})
    assert [cost.name for cost in costs] == ["_sm80/a"]


@pytest.mark.parametrize(("words", "verbose"), [("a.cu: warning: x", False), ("hello", True)])
def test_launcher_shows_warnings(
    tmp_path: Path,
    compiler: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    words: str,
    verbose: bool,
) -> None:
    monkeypatch.setenv("WORDS", words)
    command = [str(compiler), "-c", "a.cu", "-o", str(tmp_path / "a.o"), "-O3"]
    assert measured.run(str(tmp_path), verbose, command) == 0
    assert words in capfd.readouterr().err


def test_launcher_hands_failure_and_other_commands_over(tmp_path: Path, compiler: Path) -> None:
    launcher = [sys.executable, "-I", measured.__file__, str(tmp_path / "logs"), "0"]
    command = [*launcher, str(compiler), "-c", "a.cu", "-o", str(tmp_path / "a.o"), "-O3"]
    env = {**os.environ, "WORDS": "error: no", "FAIL": "1"}
    failed = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (failed.returncode, failed.stderr) == (3, "error: no\n")
    assert not (tmp_path / "a.o.json").exists()
    version = subprocess.run([*launcher, "echo", "-v"], capture_output=True, text=True, check=True)
    assert version.stdout == "-v\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(8, "8s"), (59.6, "1m00s"), (192, "3m12s"), (3900, "1h05m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_remaining_seconds() -> None:
    assert remaining_seconds([], {}, 5, 3, 2) == 0
    assert remaining_seconds(["a"], {}, 5, 0, 2) is None
    assert remaining_seconds(["a", "b"], {}, 6, 3, 2) == 4  # two seconds each so far
    assert remaining_seconds(["a", "b", "c"], {"a": 4, "b": 8}, 0, 0, 2) == 9  # c: the mean, 6
    assert remaining_seconds(["a", "b"], {"a": 1, "b": 8}, 0, 0, 4) == 8  # the longest decides


def write_record(path: Path, seconds: float) -> None:
    path.write_text(json.dumps({"seconds": seconds, "cpu_seconds": 1, "peak_mb": 1}))


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    records = {f"_sm80/{name}": tmp_path / f"{name}.o.json" for name in "abc"}
    write_record(records["_sm80/a"], 30)  # of an earlier build
    terminal = tmp_path / "tty"
    terminal.touch()
    with Progress(records, 2, pytest.fail, terminal, interval=0.01) as progress:
        assert progress.line().startswith("0/3 objects  starting  0s  ETA 45s")
        write_record(records["_sm80/b"], 2)
        progress._stop.wait(0.2)
        assert progress.line().startswith("1/3 objects  _sm80/b")
        progress.finish(records)
    assert b"3/3 objects" in terminal.read_bytes()
    assert terminal.read_bytes().endswith(b"\r\x1b[K")


def test_progress_without_a_terminal(tmp_path: Path) -> None:
    records = {str(n): tmp_path / f"{n}.o.json" for n in range(20)}
    lines: list[str] = []
    with Progress(records, 1, lines.append, tmp_path / "no" / "tty", interval=0.01) as progress:
        for record in records.values():
            write_record(record, 1)
            progress._stop.wait(0.02)
    assert lines[-1].startswith("20/20 objects")
    assert len(lines) <= 10  # a line for each tenth, no more


def test_glibc_min(tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.4\0GLIBCXX_3.4.30\0")
    assert report.glibc_min([library]) == "2.34"
    assert report.glibc_min([]) == ""


def test_git_sha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = tmp_path / "git"
    git.write_text('#!/bin/sh\ncase "$*" in *rev-parse*) echo abc;; *) echo " M x";; esac\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert report.git_sha(tmp_path) == "abc+changes"
    git.write_text("#!/bin/sh\nexit 128\n")
    assert report.git_sha(tmp_path) == ""


def test_build_info_and_table() -> None:
    kernels = ptxas.parse_log(LOG)
    result = report.BuildResult(
        objects=[
            report.ObjectCost("_C/plan", 1.0, 0.9, 90, 12),
            report.ObjectCost("_sm80/sm80_combine", 30.0, 29.0, 400, 110),
        ],
        libraries={"_C.abi3.so": 2048},
        kernels={"sm80_combine": kernels},
        warnings=["sm80_combine: C7510"],
        seconds=75,
    )
    info = report.build_info({"version": "1"}, result)
    assert info["version"] == "1"
    assert (info["cpu_seconds"], info["peak_compiler_mb"]) == (29.9, 400)
    assert info["kernels"][0]["object"] == "sm80_combine"
    assert info["kernels"][0]["registers"] == 42
    json.dumps(info)
    lines = report.table(result).splitlines()
    assert lines[1].startswith(
        "_sm80/sm80_combine     30.0   29.0      400      110   255       56"
    )
    assert lines[1].endswith("over 15 CPU-s or 1024 MB")
    assert "_C.abi3.so: 2 KB" in lines
    assert "1m15s on the clock, 30 CPU-seconds, compiler peak 400 MB, 2 kernels, 1 with spills" in (
        lines
    )
    assert "spills: _ZN2fa6rotaryEPf (sm_90a): 24 bytes stored" in lines
    assert "ptxas warning: sm80_combine: C7510" in lines
    assert report.table(report.BuildResult()).startswith("0s on the clock")


def test_messages(capsys: pytest.CaptureFixture) -> None:
    say(framed(["one", "three"]))
    assert capsys.readouterr().err == (
        "[flash_attn_ext] +-------+\n[flash_attn_ext] | one   |\n"
        "[flash_attn_ext] | three |\n[flash_attn_ext] +-------+\n"
    )
