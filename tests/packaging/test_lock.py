"""One build at a time in a folder, and no compiler for a build that has ended."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from build_tools import lock, measured

ROOT = Path(__file__).resolve().parents[2]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that has printed a line already."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


BUILD = """
    import sys, time
    from pathlib import Path
    from build_tools import lock
    with lock.alone_in(Path(sys.argv[1])):
        print("started", flush=True)
        time.sleep(1)
        (Path(sys.argv[1]) / "done").touch()
"""
COMPILER = """
    import sys, time
    from build_tools import measured
    print("started", flush=True)
    command = ["sh", "-c", "sleep 1; touch $1", "-o", sys.argv[1] + "/x.o"]
    measured.run(sys.argv[1] + "/logs", False, command)
"""


@pytest.mark.parametrize(
    ("code", "says"), [(BUILD, "another build works in"), (COMPILER, "compilers of a build")]
)
def test_a_build_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, says: str
) -> None:
    process = start(code, tmp_path)
    time.sleep(0.3)  # the compiler is started behind its line
    with lock.alone_in(tmp_path):
        assert (tmp_path / ("done" if code == BUILD else "x.o")).exists()
    assert says in capsys.readouterr().err
    assert process.wait() == 0


def test_builds_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with lock.alone_in(tmp_path):
            pass
    assert capsys.readouterr().err == ""


def test_no_compiler_for_a_build_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = start("print('started')")
    ended.wait()
    target = tmp_path / "x.o"
    command = ["touch", "-c", "-o", str(target)]
    monkeypatch.setenv(lock.OWNER, str(ended.pid))
    assert measured.run(str(tmp_path / "logs"), False, command) == 1
    assert "its build has ended" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
