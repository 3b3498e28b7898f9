"""tools/check_ptxas.py: what it reads in the logs, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import check_ptxas
import pytest

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2fa7combineEi' for 'sm_80'
ptxas info    : Function properties for _ZN2fa7combineEi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 66.064 ms
"""
SPILLS = CLEAN.replace("0 bytes spill stores, 0 bytes", "24 bytes spill stores, 32 bytes")
SERIALISED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to insufficient register resources for the wgmma pipeline in function 'k'\n"
)
IGNORED = (
    "ptxas warning : setmaxnreg is ignored; unable to determine register count at entry of 'k'\n"
)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "ptxas"
    folder.mkdir()
    (folder / "sm80_combine.log").write_text(CLEAN)
    return folder


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    path = tmp_path / "allowed.txt"
    path.write_text("# nothing\n\n")
    return path


def check(logs: Path, allowed: Path) -> int:
    return check_ptxas.main([str(logs), "--allowed", str(allowed), "--table"])


def test_clean_log_passes(logs: Path, allowed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(logs, allowed) == 0
    out = capsys.readouterr().out
    assert "40    1024       0  sm_80    fa::combine(int)" in out
    assert "1 kernels in 1 objects, 0 spill, at most 40 registers" in out


def test_spill_needs_leave(logs: Path, allowed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (logs / "sm80_combine.log").write_text(SPILLS)
    assert check(logs, allowed) == 1
    assert "spills 56 bytes, allowed 0" in capsys.readouterr().out
    allowed.write_text("sm_80 fa::combine 55 measured: no slower\n")
    assert check(logs, allowed) == 1
    allowed.write_text("sm_80 fa::combine 56 measured: no slower\n")
    assert check(logs, allowed) == 0
    allowed.write_text("sm_90a fa::combine 56 measured: no slower\n")
    assert check(logs, allowed) == 1


def test_stale_leave_fails(logs: Path, allowed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    allowed.write_text("sm_80 fa::combine 8 it used to spill\n")
    assert check(logs, allowed) == 1
    assert "matches no kernel that spills" in capsys.readouterr().out


def test_leave_needs_a_reason(logs: Path, allowed: Path) -> None:
    allowed.write_text("sm_80 fa::combine 8\n")
    with pytest.raises(ValueError, match="expected `sm_NN kernel_regex max_bytes reason`"):
        check(logs, allowed)


@pytest.mark.parametrize("line", [SERIALISED, IGNORED])
def test_warnings_fail_whatever_is_allowed(
    logs: Path, allowed: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (logs / "sm90_fwd.log").write_text(CLEAN + line)
    assert check(logs, allowed) == 1
    assert "sm90_fwd.log: ptxas" in capsys.readouterr().out


def test_no_logs_is_no_success(tmp_path: Path, allowed: Path) -> None:
    assert check(tmp_path, allowed) == 2


def test_list_of_the_repository() -> None:
    check_ptxas.read_allowed(Path(check_ptxas.__file__).parent / "allowed_spills.txt")
