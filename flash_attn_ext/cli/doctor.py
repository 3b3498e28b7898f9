"""Check the installation; every failure comes with its cause and the command that fixes it.

Exit code 1 if something is wrong. Warnings (!) name what works less well than it could.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flash_attn_ext.cli import _environment, _output
from flash_attn_ext.cli._build_tools import archs, switches
from flash_attn_ext.cli._environment import Environment, parse_version

State = Literal["ok", "info", "warning", "error"]

PYTHON_MIN = (3, 10)
TORCH_MIN = (2, 10)
MIN_DISK_GIB = 3.0  # sources, objects and libraries of a full build, and pip's copies of them
MIN_MEMORY_GIB = 2.0  # the largest compiler process, and pip around it
INSTALL = "pip install ."
REBUILD = "FLASH_ATTN_EXT_FORCE_BUILD=1 pip install --force-reinstall --no-deps ."


@dataclass(frozen=True)
class Check:
    """One answer.

    Attributes:
        name: what was looked at.
        state: "ok", "info" (a fact, no judgement), "warning" or "error".
        found: one line: what there is, and if it is wrong, why.
        fix: the command that repairs it; empty if there is nothing to do.
    """

    name: str
    state: State
    found: str
    fix: str = ""


def check_python(env: Environment) -> Check:
    """Python, platform and C library."""
    found = f"Python {env.python}, {env.system}, " + (
        f"glibc {env.glibc}" if env.glibc else "no glibc"
    )
    if parse_version(env.python) < PYTHON_MIN:
        need = ".".join(map(str, PYTHON_MIN))
        return Check(
            "python",
            "error",
            f"{found}; Python >= {need} is needed",
            "python3.12 -m venv venv && . venv/bin/activate && " + INSTALL,
        )
    if not env.system.startswith("Linux"):
        return Check("python", "warning", f"{found}; outside Linux only the CPU backend runs")
    glibc_min = (env.build_info or {}).get("glibc_min")
    if glibc_min and env.glibc and parse_version(env.glibc) < parse_version(glibc_min):
        return Check(
            "python",
            "error",
            f"{found}; this build needs glibc >= {glibc_min}",
            REBUILD,
        )
    return Check("python", "ok", found)


def check_torch(env: Environment) -> Check:
    """Version and ABI of torch."""
    torch_min = (env.build_info or {}).get("torch_min") or ".".join(map(str, TORCH_MIN))
    if parse_version(env.torch_version) < parse_version(torch_min):
        return Check(
            "torch",
            "error",
            f"torch {env.torch_version} is too old; this version needs >= {torch_min}",
            f"pip install -U 'torch>={torch_min}'",
        )
    if not env.torch_cxx11abi:
        return Check(
            "torch",
            "error",
            f"torch {env.torch_version} was built with _GLIBCXX_USE_CXX11_ABI=0; the compiled "
            "library needs 1, as in every official torch since 2.7",
            "pip install -U --force-reinstall torch",
        )
    cuda = f"CUDA {env.torch_cuda}" if env.torch_cuda else "CPU only"
    return Check("torch", "ok", f"torch {env.torch_version} ({cuda})")


def check_torch_cuda(env: Environment) -> Check:
    """Whether torch can use the GPUs of the machine."""
    name = "torch and GPU"
    if not env.gpus:
        if env.driver is None and env.torch_cuda is not None:
            return Check(name, "info", "no NVIDIA driver answers; the CPU backend computes")
        return Check(name, "info", "no GPU; the CPU backend computes")
    if env.torch_cuda is None:
        return Check(
            name,
            "error",
            f"torch {env.torch_version} is CPU-only although this machine has a {env.gpus[0].name}",
            "pip install --force-reinstall torch  (choose a CUDA build at pytorch.org/get-started)",
        )
    if not env.cuda_available:
        if env.variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            variable = "CUDA_VISIBLE_DEVICES"
            return Check(name, "warning", f"{variable} hides every GPU", f"unset {variable}")
        return Check(
            name,
            "error",
            f"torch built for CUDA {env.torch_cuda} cannot use the GPU with driver {env.driver}",
            "python -c 'import torch; torch.cuda.init()'  (prints torch's reason; then update the "
            "driver or install a torch for an older CUDA)",
        )
    if env.cuda_error is not None:
        return Check(
            name,
            "error",
            f"a first op or CUDA graph failed: {env.cuda_error}",
            "nvidia-smi  (look for errors and other processes)",
        )
    return Check(name, "ok", "one op and one CUDA graph ran")


def check_source_tree(env: Environment) -> Check:
    """Whether the imported package is an installed one."""
    name = "installed package"
    if env.build_info is not None:
        found = f"flash_attn_ext {env.version} in {env.package_dir}"
        if env.redirected_from is not None:
            found += f", used instead of the bare source tree {env.redirected_from}"
        return Check(name, "ok", found)
    if env.variables.get("FLASH_ATTN_EXT_SOURCE_TREE", "0") not in ("", "0"):
        return Check(
            name,
            "warning",
            f"imported from the source tree {env.package_dir} because FLASH_ATTN_EXT_SOURCE_TREE "
            "is set; it holds no compiled library",
            "unset FLASH_ATTN_EXT_SOURCE_TREE",
        )
    return Check(
        name,
        "error",
        f"imported from the source tree {env.package_dir}, which holds no compiled library, and no "
        "installed copy was found",
        f"cd {env.package_dir.parent} && {INSTALL}",
    )


def check_copies(env: Environment) -> Check:
    """Whether another installed copy could be imported by accident."""
    if not env.copies:
        return Check("one copy", "ok", "no other installed copy on the module path")
    others = ", ".join(map(str, env.copies))
    return Check(
        "one copy",
        "error",
        f"{env.package_dir} is in use, but there is also {others}; which one is imported depends "
        "on the folder Python starts in",
        f"pip uninstall -y flash_attn_ext  (once for every copy), then {INSTALL}",
    )


def _from_sentence(name: str, sentence: str) -> Check:
    """A problem as `_load` tells it: "cause; fix: command"."""
    found, _, fix = sentence.partition("; fix: ")
    # The sentence may end with a full stop, the command "pip install ." with a folder.
    return Check(name, "error", found, re.sub(r"(?<=\S)\.$", "", fix))


def check_binder(env: Environment) -> Check:
    """Whether the compiled library was loaded, and what the loader says if not."""
    name = "compiled library"
    if env.binder_loaded:
        return Check(name, "ok", "loaded")
    if env.build_info is not None and env.load_problems:
        return _from_sentence(name, env.load_problems[0])
    return Check(name, "info", "none; PyTorch operations compute everything")


def check_sources(env: Environment) -> Check:
    """Whether the libraries were built from the sources that a developer has in front of them."""
    if env.source_problem:
        return _from_sentence("sources", env.source_problem)
    return Check("sources", "ok", "the libraries are not older than the sources beside them")


def check_driver(env: Environment) -> Check:
    """Whether the driver runs the CUDA runtime inside the kernel libraries."""
    if env.driver_problem:
        return _from_sentence("driver", env.driver_problem)
    if env.driver is None:
        return Check("driver", "info", "no NVIDIA driver")
    driver_min = (env.build_info or {}).get("driver_min")
    need = f"; the kernels need >= {driver_min}" if driver_min else ""
    return Check("driver", "ok", f"driver {env.driver}{need}")


def check_gpu_libraries(env: Environment) -> list[Check]:
    """For every kind of GPU: which kernel library serves it."""
    checks = []
    for gpu in dict.fromkeys(env.gpus):
        name = f"kernels for {gpu.name}"
        sm = "sm" + "".join(map(str, gpu.compute_capability))
        wanted = [
            library
            for library in archs.libraries_for_capability(*gpu.compute_capability)
            if env.arch_names is None or library in env.arch_names
        ]
        present = [library for library in wanted if library in env.arch_libraries]
        missing = [library for library in wanted if library not in env.arch_libraries]
        if not wanted:
            checks.append(
                Check(
                    name,
                    "warning",
                    f"{sm} is older than sm80, for which the oldest kernels are written; PyTorch "
                    "operations compute attention on it",
                )
            )
        elif missing:
            checks.append(
                Check(
                    name,
                    "warning" if present else "error",
                    f"{sm} would use the libraries {', '.join(wanted)}; this installation lacks "
                    f"{', '.join(missing)} (has: {', '.join(env.arch_libraries) or 'none'})",
                    f"FLASH_ATTN_EXT_ARCHS={sm.removeprefix('sm')} {REBUILD}",
                )
            )
        else:
            checks.append(Check(name, "ok", f"{sm} uses {', '.join(present)}"))
    return checks


def check_introspect(env: Environment) -> Check:
    """Whether the planner can be asked from Python."""
    if env.introspect:
        return Check("introspection", "ok", "explain and kernels can ask the planner")
    return Check(
        "introspection",
        "warning",
        f"no _introspect module for Python {env.python}; explain and kernels need it",
        f"pip install pybind11 && {REBUILD}",
    )


def check_toolkit(env: Environment) -> Check:
    """The CUDA toolkit that a build would use."""
    name = "nvcc"
    if env.toolkit is None:
        reasons = "; ".join(env.toolkit_refused) or "none on the PATH, in CUDA_HOME or /usr/local"
        needed = bool(env.gpus) and not env.arch_libraries
        return Check(
            name,
            "error" if needed else "info",
            f"no CUDA toolkit ({reasons}); it is needed only to build kernels",
            f"FLASH_ATTN_EXT_NVCC=pip {REBUILD}" if needed else "",
        )
    release = ".".join(map(str, env.toolkit.version))
    found = f"CUDA {release} in {env.toolkit.home} ({env.toolkit.origin})"
    home = env.toolkit.home
    if env.nvcc_on_path is not None and env.nvcc_on_path.resolve() != (home / "bin/nvcc").resolve():
        return Check(
            name,
            "warning",
            f"{found}; but nvcc on the PATH is {env.nvcc_on_path}, a wrapper or another toolkit, "
            "and tools that guess CUDA_HOME from it go wrong",
            f"export CUDA_HOME={home} PATH={home}/bin:$PATH",
        )
    if env.torch_cuda and parse_version(env.torch_cuda)[0] != env.toolkit.version[0]:
        return Check(
            name,
            "info",
            f"{found}; torch has CUDA {env.torch_cuda}. The difference does no harm: the kernels "
            "hold their own CUDA runtime",
        )
    return Check(name, "ok", found)


def check_ninja(env: Environment) -> Check:
    """Whether ninja runs; a build without it compiles one file after another."""
    if env.ninja is None:
        return Check(
            "ninja",
            "warning",
            "ninja is missing or does not run; a build would compile one file after another",
            "pip uninstall -y ninja && pip install ninja",
        )
    return Check("ninja", "ok", f"ninja {env.ninja}")


def check_memory(env: Environment) -> Check:
    """How many compilers a build would run."""
    found = f"a build would run MAX_JOBS={env.num_jobs} compilers: {env.jobs_reason}"
    if env.memory_gib < MIN_MEMORY_GIB:
        return Check(
            "memory",
            "warning",
            f"{found}; less than {MIN_MEMORY_GIB:g} GiB is free and the build may be killed",
            "python wheels/pick.py --install  (a prebuilt wheel needs no compiler)",
        )
    return Check("memory", "ok", found)


def check_disk(env: Environment) -> Check:
    """Room for a build in the folder of temporary files."""
    found = f"{env.disk_gib:.1f} GiB free for temporary files"
    if env.disk_gib < MIN_DISK_GIB:
        return Check(
            "disk",
            "warning",
            f"{found}; a build may need {MIN_DISK_GIB:g}",
            "TMPDIR=/folder/with/room pip install .",
        )
    return Check("disk", "ok", found)


def check_neighbours(env: Environment) -> Check:
    """Other providers of attention, and frameworks."""
    found = ", ".join(f"{name} {version}" for name, version in env.neighbours.items())
    return Check(
        "other packages",
        "info",
        f"{found}; what can use this package: docs/integrations.md"
        if found
        else "none that matter",
    )


RUNTIME_VARIABLES: dict[str, tuple[str, ...]] = {
    "FLASH_ATTN_EXT_ARCH": ("sm80", "sm89", "sm90"),
    "FLASH_ATTN_EXT_BACKEND": ("auto", "tiled"),
    "FLASH_ATTN_EXT_DEBUG": ("0", "1"),
    "FLASH_ATTN_EXT_FALLBACK": ("warn", "allow", "error"),
    "FLASH_ATTN_EXT_SDPA": ("0", "1"),
    "FLASH_ATTN_EXT_SMEM_KB": (),
    "FLASH_ATTN_EXT_SOURCE_TREE": (),
}
"""What the package reads at run time, and the values it understands (empty: any)."""


def known_variables() -> dict[str, tuple[str, ...]]:
    """Every FLASH_ATTN_EXT_ variable that a build or the package reads."""
    build: dict[str, tuple[str, ...]] = {
        f"FLASH_ATTN_EXT_{field.name.upper()}": ()
        for field in dataclasses.fields(switches.Switches)
    }
    return {**build, **RUNTIME_VARIABLES}


def check_variables(env: Environment) -> list[Check]:
    """The variables in force; a misspelt one would be ignored silently."""
    name = "environment"
    checks = []
    known = known_variables()
    for variable, value in env.variables.items():
        if variable.startswith("FLASH_ATTN_EXT_") and variable not in known:
            near = difflib.get_close_matches(variable, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            fix = f"unset {variable}" + (f"; export {near[0]}={value}" if near else "")
            checks.append(Check(name, "error", f"nothing reads {variable}={value}{meant}", fix))
        elif known.get(variable) and value not in known[variable]:
            values = ", ".join(known[variable])
            checks.append(
                Check(
                    name,
                    "error",
                    f"{variable}={value} is not understood; expected one of {values}",
                    f"unset {variable}",
                )
            )
        else:
            checks.append(Check(name, "info", f"{variable}={value}"))
    return checks or [Check(name, "ok", "no variable changes what is built or run")]


CHECKS: tuple[Callable[[Environment], Check | list[Check]], ...] = (
    check_python,
    check_torch,
    check_source_tree,
    check_copies,
    check_binder,
    check_sources,
    check_torch_cuda,
    check_driver,
    check_gpu_libraries,
    check_introspect,
    check_toolkit,
    check_ninja,
    check_memory,
    check_disk,
    check_neighbours,
    check_variables,
)


def examine(env: Environment) -> list[Check]:
    """All checks, in order."""
    answers: list[Check] = []
    for check in CHECKS:
        answer = check(env)
        answers += answer if isinstance(answer, list) else [answer]
    return answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    _output.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the checks; 1 if one of them is an error."""
    env = _environment.collect()
    answers = examine(env)
    failed = sum(answer.state == "error" for answer in answers)
    if args.json:
        _output.print_json({"ok": failed == 0, "checks": answers, "environment": env})
        return int(failed > 0)
    for answer in answers:
        print(f"{_output.mark(answer.state)} {answer.name}: {answer.found}")
        if answer.fix:
            print(f"    fix: {answer.fix}")
    print()
    print("nothing is wrong" if failed == 0 else f"{failed} of {len(answers)} checks failed")
    return int(failed > 0)
