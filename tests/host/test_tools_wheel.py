"""tools/check_wheel.py on small wheels made here with g++."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import check_wheel
import pytest
from helpers import NEEDS_CXX, require

NAME = "flash_attn_ext-1.2.3+cu13-cp310-abi3-linux_x86_64.whl"
BACKEND = "int fa_get_backend(void) { return 0; }"


def shared_object(path: Path, code: str, *flags: str) -> Path:
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-o", path, "-x", "c", "-", "-x", "none", *flags],
        input=code.encode(),
        check=True,
    )
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked form of a wheel that is in order, and stubs of torch's libraries beside it."""
    require(NEEDS_CXX)
    root = tmp_path_factory.mktemp("wheel")
    (root / "stubs").mkdir()
    for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
        shared_object(root / "stubs" / name, "", f"-Wl,-soname,{name}")
    folder = root / "unpacked"
    (folder / "flash_attn_ext").mkdir(parents=True)
    info = folder / "flash_attn_ext-1.2.3+cu13.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: x\nVersion: 1.2.3+cu13\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nTag: cp310-abi3-linux_x86_64\n")
    points = "[vllm.general_plugins]\nx = flash_attn_ext.y:z\n[sglang.srt.plugins]\n"
    (info / "entry_points.txt").write_text(points)
    library = folder / "flash_attn_ext"
    (library / "y.py").write_text("")
    (library / "_version.py").write_text('__version__ = "1.2.3"\n')
    (library / "_build_info.json").write_text("{}")
    shared_object(library / "_sm80.abi3.so", BACKEND)
    shared_object(
        library / "_C.abi3.so",
        "int x;",
        "-Wl,--no-as-needed",
        str(root / "stubs/libtorch_cpu.so"),
    )
    shared_object(library / "_introspect.cpython-311-x86_64-linux-gnu.so", "int y;")
    return root


@pytest.fixture
def package(template: Path, tmp_path: Path) -> Path:
    """The folder of a wheel to spoil; `stubs` lies beside it."""
    shutil.copytree(template, tmp_path / "wheel")
    return tmp_path / "wheel" / "unpacked"


def problems(package: Path, name: str = NAME, *, cuda: bool = True) -> str:
    wheel = package.parent / name
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in package.rglob("*"):
            archive.write(path, path.relative_to(package))
    return "\n".join(check_wheel.wheel_problems(wheel, package, cuda=cuda))


def test_wheel_in_order(package: Path) -> None:
    assert problems(package) == ""


def test_version_is_compared_without_case(package: Path) -> None:
    """Setuptools writes the local version in lower case."""
    assert problems(package, NAME.replace("cu13", "CU13")) == ""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda p: shared_object(p / "_sm80.abi3.so", BACKEND + "int f;"), "expected fa_get"),
        (lambda p: shared_object(p / "_sm80.abi3.so", "static int f;"), "exports nothing"),
        (
            lambda p: shared_object(p / "_sm80.abi3.so", BACKEND, "-Wl,-rpath,/somewhere/lib"),
            "_sm80.abi3.so: has the RPATH /somewhere/lib",
        ),
        (
            lambda p: shared_object(
                p / "_C.abi3.so",
                "",
                "-Wl,--no-as-needed",
                str(p.parents[1] / "stubs/libtorch_cuda.so"),
            ),
            "_C.abi3.so: links libtorch_cuda.so",
        ),
        (
            lambda p: shared_object(
                p / "_sm80.abi3.so",
                BACKEND,
                "-Wl,--no-as-needed",
                str(p.parents[1] / "stubs/libtorch_cpu.so"),
            ),
            "_sm80.abi3.so: links libtorch_cpu.so",
        ),
        (lambda p: shared_object(p / "_other.so", ""), "_other.so: not a library that this"),
        (lambda p: (p / "_C.abi3.so").unlink(), "holds no binder"),
        (lambda p: (p / "_sm80.abi3.so").unlink(), "built without nvcc"),
        (lambda p: (p / "_build_info.json").unlink(), "_build_info.json is missing"),
        (lambda p: (p / "_version.py").write_text('__version__ = "9"'), "_version.py says 9"),
        (
            lambda p: next(p.parent.glob("*.dist-info/entry_points.txt")).write_text(""),
            "no entry point sglang.srt.plugins",
        ),
        (
            lambda p: (p / "y.py").unlink(),
            "entry point vllm.general_plugins: flash_attn_ext.y:z is not in the wheel",
        ),
        (lambda p: (p.parent / "tests").mkdir(), "installs outside the package: tests"),
        (lambda p: (p / "large").write_bytes(bytes(40_000_000)), "40.0 MB, at most 40 MB"),
    ],
)
def test_refused(package: Path, change: Callable[[Path], object], problem: str) -> None:
    change(package / "flash_attn_ext")
    assert problem in problems(package)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (NAME.replace("1.2.3", "1.2.4"), "its metadata says version 1.2.3+cu13"),
        (NAME.replace("cp310-abi3", "cp311-cp311"), "expected cp310-abi3"),
        (NAME.replace("linux", "macosx"), "expected flash_attn_ext-VERSION-cp310-abi3-PLATFORM"),
    ],
)
def test_name_must_fit(package: Path, name: str, problem: str) -> None:
    assert problem in problems(package, name)


def test_wheel_without_kernels_if_asked(package: Path) -> None:
    (package / "flash_attn_ext/_sm80.abi3.so").unlink()
    assert problems(package, cuda=False) == ""


def test_main(
    package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems(package)
    wheel = package.parent / NAME
    monkeypatch.setattr(check_wheel, "abi_problems", lambda folder: [])
    assert check_wheel.main([str(wheel)]) == 0
    assert "_sm80.abi3.so" in capsys.readouterr().out
    monkeypatch.setattr(check_wheel, "abi_problems", lambda folder: ["unstable"])
    assert check_wheel.main([str(wheel)]) == 1
    assert "error: unstable" in capsys.readouterr().out


def test_audit_says_how_to_get_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    assert check_wheel.abi_problems(Path()) == [
        "torch-abi-audit not found: pip install torch-abi-audit"
    ]


@pytest.mark.parametrize(("status", "problem"), [(0, False), (1, True)])
def test_audit_reports_the_verdict(
    status: int, problem: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "torch-abi-audit"
    tool.write_text(f"#!/bin/sh\necho verdict on $3\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: str(tool))
    assert bool(check_wheel.abi_problems(tmp_path)) is problem
