"""Builds flash_attn_ext: decides what to build on this machine, says so, and calls setuptools.

    pip install .                        isolated; uses the torch of the calling environment
    pip install . --no-build-isolation   needs ninja, packaging, pybind11, setuptools installed
    pip install -e . --no-build-isolation

Everything that steers it is listed in build_tools/switches.py. Metadata stands in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Distribution, Extension, find_namespace_packages, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools import archs, extensions, report, toolchain  # noqa: E402
from build_tools.log import framed, say  # noqa: E402
from build_tools.switches import SwitchError, Switches, read_switches  # noqa: E402

# Commands that compile. The others only ask for metadata and must be quick and quiet.
_COMPILING = {"bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}
_EDITABLE = {"editable_wheel", "develop", "build_ext"}


def say_nothing(message: str) -> None:
    """Takes the messages of the steps before the build, which would be printed three times."""


def load_pick() -> ModuleType:
    """Imports wheels/pick.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("pick", ROOT / "wheels" / "pick.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pick"] = module
    spec.loader.exec_module(module)
    return module


def prebuilt_wheel(
    pick: ModuleType, switches: Switches, commands: set[str]
) -> tuple[Path, str] | None:
    """Returns a wheel that fits and its full version; None to build.

    An editable install, a forced build, a build without CUDA and a build of a wheel to publish are
    asked for because of what the build does; they take no other's result.
    """
    if switches.force_build or switches.skip_cuda or switches.local_version or commands & _EDITABLE:
        return None
    if not (switches.wheel or switches.wheel_index or list((ROOT / "wheels").glob("*.whl"))):
        return None
    toolchain.find_torch(say_nothing)  # also the one outside of an isolated build
    wanted: tuple[str, ...] = ()
    if switches.archs:
        wanted = archs.parse_archs(switches.archs, "FLASH_ATTN_EXT_ARCHS").names
    machine = pick.dataclasses.replace(pick.this_machine(ROOT), wanted_archs=wanted)
    cache = ROOT / "build" / "wheels"
    candidates = pick.find_candidates(
        machine, switches.wheel, ROOT / "wheels", switches.wheel_index, cache
    )
    chosen = pick.choose(candidates, cache)
    if commands & _COMPILING:
        say(pick.table(candidates))
        if chosen is not None:
            say(f"using {chosen[0].file} (FLASH_ATTN_EXT_FORCE_BUILD=1 builds instead)")
    return None if chosen is None else (chosen[1], str(chosen[0].entry["version"]))


class CopiedWheel(bdist_wheel):
    """Hands a prebuilt wheel to pip in place of a built one."""

    source: Path

    def run(self) -> None:
        """Copies the wheel under its own name, which agrees with the metadata."""
        folder = Path(str(self.dist_dir))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.source, folder)


class FreshBuild(build):
    """Builds into an empty folder: an earlier build's libraries must not enter this wheel."""

    def run(self) -> None:
        """Empties the package's build folder and builds; the objects are kept elsewhere."""
        shutil.rmtree(Path(self.build_lib) / "flash_attn_ext", ignore_errors=True)
        super().run()


class BinaryDistribution(Distribution):
    """A distribution whose files depend on the machine even where no compiler was found."""

    def has_ext_modules(self) -> bool:
        """Says that the wheel is for one platform: ``_build_info.json`` describes this one."""
        return True


def choose_toolkit(switches: Switches) -> toolchain.Toolkit | None:
    """Finds nvcc, or says what is not built without it.

    Raises:
        SystemExit: FLASH_ATTN_EXT_REQUIRE_CUDA is on and there is none.
    """
    if switches.skip_cuda:
        say("FLASH_ATTN_EXT_SKIP_CUDA is on: no GPU kernels are built")
        return None
    toolkit, refused = toolchain.find_toolkit(switches.nvcc, os.environ)
    if toolkit is None:
        lines = toolchain.missing_toolkit_lines(refused)
        if switches.nvcc == "pip":
            lines.append(
                "FLASH_ATTN_EXT_NVCC=pip needs build isolation; without it, install first: "
                f"pip install '{toolchain.PIP_TOOLKIT}'"
            )
        say(framed(lines))
        if switches.require_cuda:
            raise SystemExit("FLASH_ATTN_EXT_REQUIRE_CUDA is on and no CUDA toolkit was found")
        return None
    version = ".".join(map(str, toolkit.version))
    say(f"CUDA {version}: {toolkit.origin}; what it builds needs driver >= {toolkit.driver_min}")
    return toolkit


def kernel_libraries(
    switches: Switches, toolkit: toolchain.Toolkit | None
) -> list[extensions.KernelLibrary]:
    """Returns the kernel libraries to build, the one with the most sources first.

    Raises:
        SystemExit: FLASH_ATTN_EXT_REQUIRE_CUDA is on and none can be built.
    """
    if toolkit is None:
        return []
    choice = archs.choose_archs(switches.archs, switches.torch_cuda_arch_list)
    instances = ROOT / "csrc" / "kernels" / "instances"
    sources, left_out = archs.buildable(choice, toolkit.version, instances)
    names = ", ".join(f"_{name}" for name in sources) or "none"
    say(f"kernel libraries: {names} ({choice.reason})")
    for sentence in (*choice.dropped, *left_out):
        say(f"  {sentence}")
    if switches.require_cuda and not sources:
        raise SystemExit("FLASH_ATTN_EXT_REQUIRE_CUDA is on and no kernel library can be built")
    host_compiler = os.environ.get("CXX", "")
    return [
        extensions.kernel_library(ROOT, ROOT / "build", name, sources[name], toolkit, host_compiler)
        for name in sorted(sources, key=lambda name: -len(sources[name]))
    ]


def introspect_modules(switches: Switches, torch: ModuleType) -> list[extensions.IntrospectModule]:
    """Returns the introspection module for each interpreter that was asked for."""
    include = toolchain.pybind11_include(torch)
    if not switches.pybind or include is None:
        say(
            "no introspection module: "
            + ("pybind11 is not installed" if switches.pybind else "FLASH_ATTN_EXT_PYBIND is off")
        )
        return []
    targets = toolchain.python_targets(switches.introspect_pythons, say)
    return [extensions.introspect_module(ROOT, include, target) for target in targets]


def build_arguments(pick: ModuleType, switches: Switches, version: str) -> dict[str, Any]:
    """Returns the arguments of setup() for a build on this machine.

    Raises:
        SystemExit: torch or a C++ compiler is missing.
    """
    torch = toolchain.find_torch(say)
    if torch is None:
        raise SystemExit(
            "flash_attn_ext is built against torch's headers and found no torch. "
            "Fix: pip install torch, or build with isolation: pip install ."
        )
    cxx = toolchain.find_cxx(os.environ)
    if cxx is None:
        raise SystemExit(
            "flash_attn_ext needs a C++17 compiler and found none (CXX, c++, g++, clang++). "
            "Fix: install g++, or use a prebuilt wheel: python wheels/pick.py"
        )
    from build_tools.build_ext import BuildContext, make_build_ext

    toolkit = choose_toolkit(switches)
    libraries = kernel_libraries(switches, toolkit)
    torch_dir = Path(str(torch.__file__)).parent
    modules: list[Extension] = [*libraries, extensions.binder(ROOT, torch_dir)]
    modules += introspect_modules(switches, torch)

    def facts() -> dict[str, Any]:
        cuda = ".".join(map(str, toolkit.version)) if toolkit and libraries else ""
        return {
            "version": version,
            "local_version": version.partition("+")[2],
            "archs": sorted(extensions.describe(library)[1:] for library in libraries),
            "cuda": cuda,
            "cudart": f"static {cuda}" if cuda else "",
            "driver_min": toolkit.driver_min if toolkit and libraries else "",
            "torch_min": extensions.TORCH_MIN,
            "torch_built_with": str(torch.__version__),
            "cxx11abi": bool(torch._C._GLIBCXX_USE_CXX11_ABI),
            "git_sha": report.git_sha(ROOT),
            "source_hash": pick.source_hash(ROOT),
            "python_hash": pick.python_hash(ROOT),
        }

    context = BuildContext(ROOT, torch, switches, toolkit, cxx, facts)
    commands = {"build": FreshBuild, "build_ext": make_build_ext(context)}
    return {"ext_modules": modules, "cmdclass": commands}


def arguments() -> dict[str, Any]:
    """Returns the arguments of setup() for the commands on the command line."""
    commands = set(sys.argv[1:])
    switches = read_switches(os.environ, say)
    pick = load_pick()
    version = str(pick.source_version(ROOT))
    if switches.local_version:
        version += f"+{switches.local_version}"
    prebuilt = prebuilt_wheel(pick, switches, commands)
    if prebuilt is not None:
        CopiedWheel.source, version = prebuilt
        return {"version": version, "cmdclass": {"bdist_wheel": CopiedWheel}}
    result: dict[str, Any] = {"version": version, "setup_requires": []}
    if commands & _COMPILING:
        result |= build_arguments(pick, switches, version)
    elif toolchain.find_torch(say_nothing) is None:
        result["setup_requires"].append(f"torch>={extensions.TORCH_MIN}")
    if switches.nvcc == "pip" and not switches.skip_cuda:
        result["setup_requires"].append(toolchain.PIP_TOOLKIT)
    return result


def main() -> None:
    """Runs setuptools."""
    try:
        details = arguments()
    except SwitchError as error:
        raise SystemExit(f"flash_attn_ext: {error}") from None
    setup(
        # build_tools goes along under the package: doctor asks it what a build here would find.
        packages=[
            *find_packages(include=["flash_attn_ext", "flash_attn_ext.*"]),
            # Folders for sys.path, not packages, each with the metadata of what it stands for.
            *find_namespace_packages(include=["flash_attn_ext.compat.fa[23]*"]),
            "flash_attn_ext._build_tools",
        ],
        package_dir={"flash_attn_ext._build_tools": "build_tools"},
        package_data={
            "flash_attn_ext": ["py.typed"],
            "flash_attn_ext.compat.fa2": ["*.dist-info/*"],
            "flash_attn_ext.compat.fa3": ["*.dist-info/*"],
        },
        distclass=BinaryDistribution,
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
        **details,
    )


if __name__ == "__main__":
    main()
