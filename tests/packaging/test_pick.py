"""Choosing a wheel: one test for each verdict, and for each way a wheel is found."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import threading
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_index
import pick
import pytest
from wheel_samples import INFO, MACHINE, MANYLINUX, NAME, write_wheel


def entry(name: str = NAME, **changes: Any) -> dict[str, Any]:
    info = {**INFO, **changes}
    parts = pick.parse_name(name)
    assert parts is not None
    return {"file": name, "sha256": "?", "torch_max": None, **info}


def verdict(name: str = NAME, machine: pick.Machine = MACHINE, **changes: Any) -> str:
    return pick.refusal(name, entry(name, **changes), machine)


def on(**changes: Any) -> pick.Machine:
    return dataclasses.replace(MACHINE, **changes)


def test_fits() -> None:
    assert verdict() == ""
    assert verdict(MANYLINUX) == ""
    assert verdict(machine=on(python=(3, 14), gpus=(), driver_cuda=None)) == ""
    assert verdict(machine=on(torch=None, cxx11abi=None)) == ""  # pip brings a torch that fits
    assert verdict(NAME.replace("cp310-abi3", "py3-none").replace("linux_x86_64", "any")) == ""


@pytest.mark.parametrize(
    ("name", "machine", "changes", "reason"),
    [
        (NAME, on(system="darwin", processor="arm64"), {}, "is for linux_x86_64, this machine is"),
        (MANYLINUX, on(processor="aarch64"), {}, "is for manylinux_2_28_x86_64, this machine is"),
        (MANYLINUX, on(glibc=(2, 17)), {}, "needs glibc >= 2.28, this machine has 2.17"),
        (MANYLINUX, on(glibc=None), {}, "needs glibc >= 2.28, this machine has none"),
        (NAME, on(glibc=(2, 31)), {}, "needs glibc >= 2.34, this machine has 2.31"),
        (NAME, on(python=(3, 9)), {}, "is for Python cp310-abi3, this is cp39"),
        (NAME, on(implementation="pp"), {}, "is for Python cp310-abi3, this is pp311"),
        (NAME.replace("cp310-abi3", "cp312-cp312"), MACHINE, {}, "is for Python cp312-cp312"),
        (NAME.replace("cp310", "any"), MACHINE, {}, "is for Python any-abi3"),
        (NAME, on(torch=(2, 9)), {}, "needs torch >= 2.10, this environment has 2.9"),
        (NAME, MACHINE, {"torch_max": "2.12"}, "needs torch <= 2.12, this environment has 2.13"),
        (NAME, on(cxx11abi=False), {}, "was built with cxx11abi=True, torch has False"),
        (NAME, on(gpus=((8, 6), (9, 0))), {"archs": ["sm80"]}, "has no sm90 kernels for the GPU"),
        (NAME, on(gpus=((8, 6),)), {"archs": []}, "has no sm80 kernels for the GPU"),
        (NAME, on(wanted_archs=("sm89",)), {}, "has no sm89 kernels, which were asked for"),
        (
            NAME,
            on(driver_cuda=(12, 4)),
            {},
            "was built with CUDA 13.0 and needs driver >= 580, this driver supports CUDA 12.4",
        ),
        (NAME, on(version="1.3.0"), {}, "is version 1.2.0, the source here is 1.3.0"),
        (NAME, on(source_hash="new"), {}, "was built from other C++ or build sources"),
        (NAME, on(python_hash="new"), {}, "was built from other Python files"),
        ("flash_attn-2.8.3-cp311-cp311-linux_x86_64.whl", MACHINE, {}, "is not a wheel of flash"),
    ],
)
def test_refusals(name: str, machine: pick.Machine, changes: dict[str, Any], reason: str) -> None:
    described = {**entry(), **changes}
    assert pick.refusal(name, described, machine).startswith(reason)


def test_incomplete_description() -> None:
    described = entry()
    del described["archs"]
    assert pick.refusal(NAME, described, MACHINE).startswith("has an incomplete description (Key")


def test_old_gpu_is_no_reason(tmp_path: Path) -> None:
    assert verdict(machine=on(gpus=((7, 5),))) == ""  # nothing runs on it, whichever wheel


def test_local_folder(tmp_path: Path) -> None:
    write_wheel(tmp_path)
    (candidate,) = pick.find_candidates(MACHINE, folder=tmp_path)
    assert candidate.fits
    assert candidate.entry["platform"] == "linux_x86_64"
    assert pick.choose([candidate], tmp_path) == (candidate, tmp_path / NAME)


def test_local_wheel_that_index_json_describes_otherwise(tmp_path: Path) -> None:
    path = write_wheel(tmp_path)
    assert make_index.main([str(tmp_path)]) == 0
    assert pick.find_candidates(MACHINE, folder=tmp_path)[0].fits
    with zipfile.ZipFile(path, "a") as wheel:
        wheel.writestr("extra", "tampered")
    (candidate,) = pick.find_candidates(MACHINE, folder=tmp_path)
    assert candidate.verdict == "differs from the sha256 in index.json; download it again"


def test_damaged_wheels(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"not a zip")
    with zipfile.ZipFile(tmp_path / MANYLINUX, "w") as wheel:
        wheel.writestr("x", "")
    (tmp_path / "flash_attn_ext-odd.whl").touch()
    verdicts = {c.file: c.verdict for c in pick.find_candidates(MACHINE, folder=tmp_path)}
    assert verdicts[NAME].startswith(f"{NAME} cannot be read:")
    assert verdicts[MANYLINUX] == f"{MANYLINUX} carries no {pick.BUILD_INFO}"
    assert "is not a wheel of flash_attn_ext" in verdicts["flash_attn_ext-odd.whl"]
    assert make_index.main([str(tmp_path)]) == 1


def test_unreadable_local_index_is_ignored(tmp_path: Path) -> None:
    write_wheel(tmp_path)
    (tmp_path / "index.json").write_text("[]")
    assert pick.find_candidates(MACHINE, folder=tmp_path)[0].fits


def test_named_wheel_must_fit_but_may_be_of_other_sources(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, source_hash="other", python_hash="other")
    (candidate,) = pick.find_candidates(MACHINE, named=str(path), folder=tmp_path)
    assert candidate.fits
    (candidate,) = pick.find_candidates(on(torch=(2, 9)), named=str(path), folder=tmp_path)
    assert candidate.verdict.startswith("needs torch >= 2.10")
    (candidate,) = pick.find_candidates(MACHINE, named=str(tmp_path / "gone.whl"))
    assert candidate.verdict == "does not exist"


def test_named_url(tmp_path: Path) -> None:
    path = write_wheel(tmp_path)
    url = "file://" + urllib.parse.quote(str(path))
    cache = tmp_path / "cache"
    (candidate,) = pick.find_candidates(MACHINE, named=url, cache=cache)
    assert candidate.fits
    assert pick.choose([candidate], cache) == (candidate, cache / NAME)
    (candidate,) = pick.find_candidates(MACHINE, named=url + ".gz", cache=cache)
    assert candidate.verdict == "is not a wheel of flash_attn_ext by its name"
    gone = f"file:///nonexistent/{NAME}"
    (candidate,) = pick.find_candidates(MACHINE, named=gone, cache=cache)
    assert candidate.verdict.startswith("cannot be fetched:")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder served as an index: an unfit wheel and one that fits."""
    folder = tmp_path / "served"
    folder.mkdir()
    write_wheel(folder)
    write_wheel(folder, NAME.replace("cp310-abi3", "cp39-cp39"))
    make_index.main([str(folder)])
    return folder


@pytest.fixture
def server(index: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(index))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


@pytest.mark.parametrize("kind", ["http", "file"])
def test_index(kind: str, index: Path, server: str, tmp_path: Path) -> None:
    base = server if kind == "http" else f"file://{index}"
    empty, cache = tmp_path / "empty", tmp_path / "cache"
    empty.mkdir()
    candidates = pick.find_candidates(MACHINE, folder=empty, index_url=base, cache=cache)
    assert [candidate.fits for candidate in candidates] == [True, False]
    chosen = pick.choose(candidates, cache)
    assert chosen is not None
    assert chosen[1] == cache / NAME
    assert pick.file_hash(chosen[1]) == pick.file_hash(index / NAME)
    (index / NAME).unlink()  # the copy in the cache is good, nothing is fetched again
    assert pick.choose(candidates, cache) is not None
    (cache / NAME).write_bytes(b"damaged")
    assert pick.choose(candidates, cache) is None
    assert candidates[0].verdict.startswith("cannot be fetched:")


def test_tampered_file_of_an_index(index: Path, server: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(index / NAME, "a") as wheel:
        wheel.writestr("extra", "tampered")
    cache = tmp_path / "cache"
    candidates = pick.find_candidates(MACHINE, folder=tmp_path, index_url=server, cache=cache)
    assert pick.choose(candidates, cache) is None
    assert candidates[0].verdict == (
        "was fetched, but its sha256 is not the one in index.json; not used"
    )
    assert not (cache / NAME).exists()


@pytest.mark.parametrize("file", ["../" + NAME, NAME.replace("1.2.0", "../../../1.2.0")])
def test_an_entry_that_leaves_the_cache(tmp_path: Path, file: str) -> None:
    described = {**entry(), "file": file}
    (tmp_path / "index.json").write_text(json.dumps({"wheels": [described]}))
    url = f"file://{tmp_path}"
    candidates = pick.find_candidates(MACHINE, folder=tmp_path / "none", index_url=url)
    assert candidates[0].verdict == "is not a wheel of flash_attn_ext by its name"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "is not available: <urlopen error"),
        ("{}", "is not available: 'wheels'"),
        ("nonsense", "is not available: Expecting value"),
        ('{"wheels": [1]}', "is not available: expected"),
    ],
)
def test_unavailable_index_is_a_sentence(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "index.json").write_text(text)
    (candidate,) = pick.find_candidates(
        MACHINE, folder=tmp_path / "none", index_url=f"file://{tmp_path}"
    )
    assert reason in candidate.verdict


def test_an_index_that_is_no_url(tmp_path: Path) -> None:
    (candidate,) = pick.find_candidates(MACHINE, folder=tmp_path, index_url="/some/folder")
    assert candidate.verdict.endswith("is not available: it is no http or file URL")


def test_a_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(pick, "TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        (candidate,) = pick.find_candidates(MACHINE, folder=tmp_path, index_url=url)
    assert "timed out" in candidate.verdict


def test_hashes_change_with_the_sources(tmp_path: Path) -> None:
    for name in ("csrc/plan/plan.cpp", "build_tools/jobs.py", "setup.py", "flash_attn_ext/a.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    compiled, python = pick.source_hash(tmp_path), pick.python_hash(tmp_path)
    (tmp_path / "flash_attn_ext" / "a.py").write_text("edited")
    assert pick.source_hash(tmp_path) == compiled
    assert pick.python_hash(tmp_path) != python
    for name in ("csrc/plan/plan.cpp", "build_tools/jobs.py", "setup.py"):
        before = pick.source_hash(tmp_path)
        (tmp_path / name).write_text("edited")
        assert pick.source_hash(tmp_path) != before
    before = pick.source_hash(tmp_path)
    (tmp_path / "csrc" / "new.h").write_text("")
    assert pick.source_hash(tmp_path) != before


def test_this_machine() -> None:
    machine = pick.this_machine()
    assert machine.torch is not None
    assert machine.torch >= (2, 10)
    assert machine.version == pick.source_version()
    assert machine.source_hash == pick.source_hash()
    assert pick.source_version(Path("/nonexistent")) is None


def test_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        version_status = init_status = 0

        def cuDriverGetVersion(self, version) -> int:
            version._obj.value = 12080
            return self.version_status

        def cuInit(self, flags: int) -> int:
            return self.init_status

        def cuDeviceGetCount(self, count) -> int:
            count._obj.value = 1
            return 0

        def cuDeviceGetAttribute(self, value, attribute: int, device: int) -> int:
            value._obj.value = {75: 8, 76: 6}[attribute]
            return 0

    cuda = Cuda()
    monkeypatch.setattr(pick.ctypes, "CDLL", lambda name: cuda)
    assert pick._ask_driver() == ((12, 8), ((8, 6),))
    cuda.init_status = 100
    assert pick._ask_driver() == ((12, 8), ())
    cuda.version_status = 1
    assert pick._ask_driver() == (None, ())


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the command line on MACHINE; pip commands are collected, not run."""
    monkeypatch.setattr(pick, "this_machine", lambda: MACHINE)
    commands: list[list[str]] = []

    def run(arguments: list[str], check: bool) -> Any:
        commands.append(arguments)
        return pick.subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(pick.subprocess, "run", run)
    return commands


def test_command_line(
    tmp_path: Path, command: list[list[str]], capsys: pytest.CaptureFixture
) -> None:
    folder = ["--folder", str(tmp_path), "--wheel", "", "--index", ""]
    assert pick.main(folder) == 1
    assert "No wheel fits. Build from source: pip install ." in capsys.readouterr().out
    assert pick.main([*folder, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["wheels"] == []
    write_wheel(tmp_path)
    write_wheel(tmp_path, NAME.replace("cp310-abi3", "cp39-cp39"))
    assert pick.main(folder) == 0
    out = capsys.readouterr().out
    assert f"{NAME}  fits  local" in out
    assert "no    is for Python cp39-cp39, this is cp311" in out
    assert f"-m pip install --force-reinstall {tmp_path / NAME}" in out
    assert pick.main([*folder, "--json"]) == 0
    assert [row["fits"] for row in json.loads(capsys.readouterr().out)["wheels"]] == [True, False]
    assert command == []
    assert pick.main([*folder, "--install"]) == 0
    assert command[0][-3:] == ["--force-reinstall", "--no-deps", str(tmp_path / NAME)]


def test_command_line_any_source(tmp_path: Path, command: list[list[str]]) -> None:
    write_wheel(tmp_path, source_hash="other")
    folder = ["--folder", str(tmp_path), "--wheel", "", "--index", ""]
    assert pick.main(folder) == 1
    assert pick.main([*folder, "--any-source"]) == 0


def test_command_line_index(
    index: Path, command: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--folder", str(tmp_path), "--wheel", "", "--index", f"file://{index}"]
    assert pick.main(arguments) == 0
    assert "(--install fetches it)" in capsys.readouterr().out
