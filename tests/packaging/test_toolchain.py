from __future__ import annotations

import sys
from pathlib import Path

import pytest

from build_tools import toolchain
from build_tools.toolchain import find_toolkit


def make_toolkit(
    home: Path, version: str = "13.0", libraries: str = "lib64", header: bool = True
) -> Path:
    """A folder that answers like a CUDA toolkit."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --dryrun ]; then echo "#$ TOP={home}/bin/.." >&2; exit; fi\n'
        f'echo "Cuda compilation tools, release {version}, V{version}.88"\n'
    )
    nvcc.chmod(0o755)
    if header:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    if libraries:
        (home / libraries).mkdir(parents=True)
        (home / libraries / "libcudart_static.a").touch()
    return home


@pytest.fixture
def empty_root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


def test_cuda_home(tmp_path: Path, empty_root: Path) -> None:
    home = make_toolkit(tmp_path / "cuda", "12.8")
    toolkit, refused = find_toolkit("", {"CUDA_HOME": str(home)}, [], empty_root)
    assert toolkit is not None
    assert (toolkit.home, toolkit.version, toolkit.driver_min) == (home, (12, 8), "525")
    assert toolkit.nvcc == home / "bin" / "nvcc"
    assert toolkit.cudart_static == home / "lib64" / "libcudart_static.a"
    assert refused == []


def test_a_wrapper_on_the_path_is_asked_for_the_true_root(tmp_path: Path, empty_root: Path) -> None:
    home = make_toolkit(tmp_path / "cuda")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    toolkit, _ = find_toolkit("", {"PATH": str(tmp_path / "bin")}, [], empty_root)
    assert toolkit is not None
    assert toolkit.home == home
    assert toolkit.origin == f"nvcc on the PATH ({wrapper})"


def test_pip_toolkit(tmp_path: Path, empty_root: Path) -> None:
    make_toolkit(tmp_path / "site" / "nvidia" / "cu12", "12.9", "lib")
    home = make_toolkit(tmp_path / "site" / "nvidia" / "cu13", "13.0", "lib")
    for request in ("", "pip"):
        toolkit, _ = find_toolkit(request, {}, [tmp_path / "site"], empty_root)
        assert toolkit is not None
        assert toolkit.home == home


def test_pip_request_looks_nowhere_else(tmp_path: Path, empty_root: Path) -> None:
    home = make_toolkit(tmp_path / "cuda")
    assert find_toolkit("pip", {"CUDA_HOME": str(home)}, [], empty_root) == (None, [])


def test_usual_folders_and_target_libraries(empty_root: Path) -> None:
    machine = toolchain.platform.machine()
    make_toolkit(empty_root / "usr/local/cuda-12.4", "12.4", f"targets/{machine}-linux/lib")
    toolkit, _ = find_toolkit("", {}, [], empty_root)
    assert toolkit is not None
    assert toolkit.version == (12, 4)


def test_order(tmp_path: Path, empty_root: Path) -> None:
    first = make_toolkit(tmp_path / "first")
    second = make_toolkit(tmp_path / "second")
    make_toolkit(empty_root / "usr/local/cuda")
    env = {"CUDA_HOME": str(second), "PATH": str(first / "bin")}
    origins = []
    toolkit, _ = find_toolkit(str(first), env, [], empty_root)
    origins.append(toolkit and toolkit.home)
    toolkit, _ = find_toolkit(str(first / "bin" / "nvcc"), env, [], empty_root)
    origins.append(toolkit and toolkit.home)
    toolkit, _ = find_toolkit("", env, [], empty_root)
    origins.append(toolkit and toolkit.home)
    toolkit, _ = find_toolkit("", {"PATH": env["PATH"]}, [], empty_root)
    origins.append(toolkit and toolkit.home)
    toolkit, _ = find_toolkit("", {}, [], empty_root)
    origins.append(toolkit and toolkit.home)
    assert origins == [first, first, second, first, empty_root / "usr/local/cuda"]


def test_refusals_are_sentences_and_the_next_folder_is_tried(
    tmp_path: Path, empty_root: Path
) -> None:
    no_header = make_toolkit(tmp_path / "no_header", header=False)
    env = {"CUDA_HOME": str(tmp_path / "gone"), "CUDA_PATH": str(no_header)}
    make_toolkit(empty_root / "usr/local/cuda", libraries="")
    good = make_toolkit(empty_root / "opt/cuda")
    toolkit, refused = find_toolkit("", env, [], empty_root)
    assert toolkit is not None
    assert toolkit.home == good
    assert refused[0].endswith("gone/bin/nvcc does not exist")
    assert refused[1].endswith("has nvcc but no include/cuda_runtime.h")
    assert "has no libcudart_static.a in lib64, lib, targets/" in refused[2]


def test_a_broken_nvcc(tmp_path: Path, empty_root: Path) -> None:
    home = make_toolkit(tmp_path / "cuda")
    (home / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    assert "does not run" in find_toolkit(str(home), {}, [], empty_root)[1][0]
    (home / "bin" / "nvcc").write_text("#!/bin/sh\necho hello\n")
    assert "tells no release" in find_toolkit(str(home), {}, [], empty_root)[1][0]


def test_missing_toolkit_names_three_ways() -> None:
    text = "\n".join(toolchain.missing_toolkit_lines(["CUDA_HOME=/x: /x/bin/nvcc does not exist"]))
    assert "GPU kernels are NOT built" in text
    assert "tried CUDA_HOME=/x: /x/bin/nvcc does not exist" in text
    for way in ("FLASH_ATTN_EXT_NVCC=pip pip install .", "CUDA_HOME=", "wheels/pick.py --install"):
        assert way in text


def test_python_targets() -> None:
    said: list[str] = []
    targets = toolchain.python_targets([sys.executable, "/nonexistent/python"], said.append)
    assert len(targets) <= 1  # the same interpreter twice is one target
    assert any("/nonexistent/python does not run" in sentence for sentence in said)


def test_torch_of_the_environment_around_an_isolated_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    library.parent.mkdir(parents=True)
    library.touch()
    (tmp_path / "torch" / "__init__.py").write_text('__version__ = "9.9"\n')
    monkeypatch.setattr(toolchain, "outer_site_packages", lambda: [tmp_path / "none", tmp_path])
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    said: list[str] = []
    torch = toolchain.find_torch(said.append)
    assert torch is not None
    assert torch.__version__ == "9.9"
    assert said == [f"isolated build: using torch 9.9 of {tmp_path}"]


def test_no_torch_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "outer_site_packages", lambda: [tmp_path])
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    assert toolchain.find_torch(pytest.fail) is None


def test_cxx(tmp_path: Path) -> None:
    assert toolchain.find_cxx({"CXX": "/nonexistent/g++"}) is None
    compiler = tmp_path / "my-c++"
    compiler.write_text("")
    compiler.chmod(0o755)
    assert toolchain.find_cxx({"CXX": f"{compiler} -m64"}) == str(compiler)
