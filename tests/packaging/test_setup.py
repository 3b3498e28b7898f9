"""setup.py: what it decides, without compiling."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import flash_attn_ext_setup as setup_script
import pick
import pytest
from wheel_samples import INFO, MACHINE, NAME, write_wheel

from build_tools import extensions, toolchain
from build_tools.build_ext import provide_ninja
from build_tools.switches import Switches

ROOT = setup_script.ROOT
TOOLKIT = toolchain.Toolkit(Path("/cuda"), (13, 0), Path("/cuda/lib64/libcudart_static.a"), "test")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two kernels, where setup.py believes to be."""
    for name in (
        "csrc/kernels/instances/sm80_combine.cu",
        "csrc/kernels/instances/sm80_rotary.cu",
        "csrc/kernels/instances/sm90_combine.cu",
        "csrc/plan/plan.cpp",
        "csrc/bindings/ops_fwd.cpp",
        "csrc/bindings/device.cpp",
        "csrc/bindings/introspect.cpp",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "wheels").mkdir()
    monkeypatch.setattr(setup_script, "ROOT", tmp_path)
    for name in ("TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_kernel_libraries(root: Path, capsys: pytest.CaptureFixture) -> None:
    libraries = setup_script.kernel_libraries(Switches(archs="all"), TOOLKIT)
    assert [extensions.describe(library) for library in libraries] == ["_sm80", "_sm90"]
    sm80 = libraries[0]
    assert sm80.cuda_sources == [
        "csrc/kernels/instances/sm80_combine.cu",
        "csrc/kernels/instances/sm80_rotary.cu",
    ]
    assert sm80.extra_objects == ["/cuda/lib64/libcudart_static.a"]
    flags = " ".join(sm80.extra_compile_args["nvcc"])
    assert "-gencode arch=compute_80,code=[sm_80,compute_80]" in flags
    assert "-Xptxas -v,--warn-on-spills" in flags
    assert "arch=compute_90a,code=sm_90a" in " ".join(libraries[1].extra_compile_args["nvcc"])
    exports = root / "build" / "kernel_library.map"
    assert exports.read_text() == "{ global: fa_get_backend; local: *; };\n"
    err = capsys.readouterr().err
    assert "kernel libraries: _sm80, _sm90 (FLASH_ATTN_EXT_ARCHS=all)" in err
    assert "_sm89: no instances in the source" in err


def test_no_kernel_library_is_an_error_only_where_cuda_is_required(root: Path) -> None:
    assert setup_script.kernel_libraries(Switches(archs="89"), TOOLKIT) == []
    with pytest.raises(SystemExit, match="REQUIRE_CUDA is on and no kernel library"):
        setup_script.kernel_libraries(Switches(archs="89", require_cuda=True), TOOLKIT)
    assert setup_script.kernel_libraries(Switches(), None) == []


def test_choose_toolkit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(toolchain, "find_toolkit", lambda request, env: (None, ["tried x: no"]))
    assert setup_script.choose_toolkit(Switches(skip_cuda=True)) is None
    assert "FLASH_ATTN_EXT_SKIP_CUDA is on" in capsys.readouterr().err
    assert setup_script.choose_toolkit(Switches(nvcc="pip")) is None
    err = capsys.readouterr().err
    assert "GPU kernels are NOT built" in err
    assert f"pip install '{toolchain.PIP_TOOLKIT}'" in err
    with pytest.raises(SystemExit, match="REQUIRE_CUDA is on and no CUDA toolkit"):
        setup_script.choose_toolkit(Switches(require_cuda=True))
    capsys.readouterr()
    monkeypatch.setattr(toolchain, "find_toolkit", lambda request, env: (TOOLKIT, []))
    assert setup_script.choose_toolkit(Switches()) is TOOLKIT
    assert "CUDA 13.0: test; what it builds needs driver >= 580" in capsys.readouterr().err


def test_introspect_modules(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    torch = SimpleNamespace(__file__=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(toolchain, "pybind11_include", lambda torch: None)
    assert setup_script.introspect_modules(Switches(), torch) == []
    assert "pybind11 is not installed" in capsys.readouterr().err
    monkeypatch.setattr(toolchain, "pybind11_include", lambda torch: Path("/pybind11"))
    assert setup_script.introspect_modules(Switches(pybind=False), torch) == []
    assert "FLASH_ATTN_EXT_PYBIND is off" in capsys.readouterr().err
    own = extensions.sysconfig.get_config_var("EXT_SUFFIX")
    targets = [
        toolchain.PythonTarget(Path("/own"), own),
        toolchain.PythonTarget(Path("/py399"), ".cpython-399-x86_64-linux-gnu.so"),
    ]
    monkeypatch.setattr(toolchain, "python_targets", lambda executables, say: targets)
    modules = setup_script.introspect_modules(Switches(), torch)
    assert [extensions.describe(module) for module in modules] == ["_introspect", "_introspect_399"]
    assert modules[1].file_name == "_introspect.cpython-399-x86_64-linux-gnu.so"
    assert modules[1].include_dirs[-1] == "/py399"
    assert "csrc/plan/plan.cpp" in modules[0].sources


def test_binder_needs_no_cuda(root: Path) -> None:
    binder = extensions.binder(root, Path("/torch"))
    assert binder.sources == [
        "csrc/bindings/ops_fwd.cpp",
        "csrc/bindings/device.cpp",
        "csrc/plan/plan.cpp",
    ]
    assert binder.libraries == ["torch_cpu", "dl"]
    assert binder.py_limited_api
    assert binder.include_dirs == [str(root / "csrc"), "/torch/include"]
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in binder.extra_compile_args["cxx"]


@pytest.fixture
def fitting_wheel(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pick, "this_machine", lambda root: MACHINE)
    return write_wheel(root / "wheels")


def test_a_fitting_wheel_is_used(fitting_wheel: Path, capsys: pytest.CaptureFixture) -> None:
    found = setup_script.prebuilt_wheel(pick, Switches(), {"bdist_wheel"})
    assert found == (fitting_wheel, INFO["version"])
    assert f"using {NAME} (FLASH_ATTN_EXT_FORCE_BUILD=1 builds instead)" in capsys.readouterr().err
    assert setup_script.prebuilt_wheel(pick, Switches(), {"dist_info"}) == found
    assert capsys.readouterr().err == ""  # metadata steps are quiet


@pytest.mark.parametrize(
    ("switches", "command"),
    [
        (Switches(force_build=True), "bdist_wheel"),
        (Switches(skip_cuda=True), "bdist_wheel"),
        (Switches(local_version="cu13"), "bdist_wheel"),
        (Switches(), "editable_wheel"),
        (Switches(), "build_ext"),
        (Switches(archs="89"), "bdist_wheel"),
    ],
)
def test_a_fitting_wheel_is_not_used(fitting_wheel: Path, switches: Switches, command: str) -> None:
    assert setup_script.prebuilt_wheel(pick, switches, {command}) is None


def test_without_wheels_nothing_is_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pick, "this_machine", pytest.fail)
    assert setup_script.prebuilt_wheel(pick, Switches(), {"bdist_wheel"}) is None


def test_copied_wheel(fitting_wheel: Path, tmp_path: Path) -> None:
    command = setup_script.CopiedWheel(setup_script.BinaryDistribution())
    command.source = fitting_wheel
    command.dist_dir = str(tmp_path / "dist")
    command.run()
    assert (tmp_path / "dist" / NAME).read_bytes() == fitting_wheel.read_bytes()


def arguments(monkeypatch: pytest.MonkeyPatch, command: str, **env: str) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return setup_script.arguments()


def test_metadata_asks_for_torch_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_script, "prebuilt_wheel", lambda *_: None)
    assert arguments(monkeypatch, "egg_info")["setup_requires"] == []
    monkeypatch.setattr(toolchain, "find_torch", lambda say: None)
    result = arguments(monkeypatch, "egg_info", FLASH_ATTN_EXT_NVCC="pip")
    assert result["setup_requires"] == ["torch>=2.10", toolchain.PIP_TOOLKIT]
    assert result["version"] == pick.source_version()
    with pytest.raises(SystemExit, match=r"found no torch\. Fix: pip install torch"):
        arguments(monkeypatch, "bdist_wheel")


def test_local_version(monkeypatch: pytest.MonkeyPatch) -> None:
    result = arguments(monkeypatch, "egg_info", FLASH_ATTN_EXT_LOCAL_VERSION="cu13torch2.10")
    assert result["version"] == f"{pick.source_version()}+cu13torch2.10"


def test_a_prebuilt_wheel_gives_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_script, "prebuilt_wheel", lambda *_: (Path("x.whl"), "1+cu13"))
    result = arguments(monkeypatch, "bdist_wheel")
    assert result["version"] == "1+cu13"
    assert result["cmdclass"] == {"bdist_wheel": setup_script.CopiedWheel}


def test_a_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_script, "prebuilt_wheel", lambda *_: None)
    with pytest.raises(SystemExit, match=r"needs a C\+\+17 compiler and found none"):
        arguments(monkeypatch, "bdist_wheel", CXX="/nonexistent/c++")


def test_a_misspelt_switch_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    monkeypatch.setenv("FLASH_ATTN_EXT_FORCE_BUILD", "perhaps")
    with pytest.raises(SystemExit, match="flash_attn_ext: FLASH_ATTN_EXT_FORCE_BUILD='perhaps'"):
        setup_script.main()


def test_ninja_is_found_or_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace(BIN_DIR="/ninja/bin"))
    provide_ninja()
    assert setup_script.os.environ["PATH"].startswith("/ninja/bin:")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(SystemExit, match="pip install ninja"):
        provide_ninja()
