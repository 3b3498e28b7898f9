"""How the facts are gathered, with programs and folders made for the test."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import pytest
import torch

from flash_attn_ext.cli import _environment, doctor

ROOT = Path(__file__).resolve().parents[2]


def make_program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_driver_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(
        tmp_path,
        "nvidia-smi",
        "echo '580.95.05, 9.0, 143771, NVIDIA H200'\necho '580.95.05, 8.6, [N/A], Odd, name'\n"
        "echo 'No devices'",
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    driver, gpus = _environment.driver_and_gpus()
    assert driver == "580.95.05"
    assert [(gpu.name, gpu.compute_capability) for gpu in gpus] == [
        ("NVIDIA H200", (9, 0)),
        ("Odd, name", (8, 6)),
    ]
    assert round(gpus[0].memory_gib) == 140
    assert gpus[1].memory_gib == 0.0


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _environment.driver_and_gpus() == (None, ())


def test_a_tool_that_fails_or_hangs_says_nothing(tmp_path: Path) -> None:
    make_program(tmp_path, "fails", "exit 3")
    make_program(tmp_path, "hangs", "sleep 30")
    assert _environment.run_tool([str(tmp_path / "fails")]) is None
    assert _environment.run_tool([str(tmp_path / "hangs")], timeout=0.2) is None
    assert _environment.run_tool(["echo", "word"]) == "word\n"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("580", (580,)), ("2.15.0a0+git", (2, 15, 0)), ("unknown", ())],
)
def test_parse_version(text: str, numbers: tuple[int, ...]) -> None:
    assert _environment.parse_version(text) == numbers


def test_other_copies(tmp_path: Path) -> None:
    folders = [tmp_path / name / "flash_attn_ext" for name in ("used", "other", "source")]
    for folder in folders:
        folder.mkdir(parents=True)
    for folder in folders[:2]:
        (folder / "_build_info.json").write_text("{}")
    paths = [str(folder.parent) for folder in folders] + [str(tmp_path / "other")]
    assert _environment.other_copies(folders[0], paths) == (folders[1].resolve(),)


def test_installed_versions() -> None:
    assert _environment.installed_versions(["torch", "no-such-package"]) == {
        "torch": importlib.metadata.version("torch")  # without the local part of some builds
    }


def test_relevant_variables() -> None:
    environ = {"FLASH_ATTN_EXT_X": "1", "HOME": "/", "MAX_JOBS": "2", "FLASH_ATTENTION_Y": "3"}
    assert list(_environment.relevant_variables(environ)) == [
        "FLASH_ATTENTION_Y",
        "FLASH_ATTN_EXT_X",
        "MAX_JOBS",
    ]


def test_a_failing_gpu_gives_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu(*args: object, **options: object) -> None:
        raise RuntimeError("CUDA error: no device\nlong advice")

    monkeypatch.setattr(torch, "ones", no_gpu)
    assert _environment.try_cuda() == "CUDA error: no device"


def test_every_variable_that_is_read_is_known() -> None:
    """Doctor's list and the sources name the same variables."""
    sources = [ROOT / "setup.py"]
    for folder in ("flash_attn_ext", "build_tools", "wheels", "csrc"):
        for pattern in ("*.py", "*.cpp", "*.h"):
            sources += (ROOT / folder).rglob(pattern)
    read = set()
    for source in sources:
        if source.name != "doctor.py":
            words = re.findall(r"\bFLASH_ATTN_EXT_[A-Z_]*[A-Z]\b", source.read_text())
            read.update(words)
    assert read - set(doctor.known_variables()) == set()
    assert set(doctor.RUNTIME_VARIABLES) - read == set()
