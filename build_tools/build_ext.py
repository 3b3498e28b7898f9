"""The ``build_ext`` command: torch's BuildExtension, with our compilers, folders and reports.

Only public behaviour of torch is used: the ``.cu`` files stay out of ``Extension.sources`` and are
compiled by ``self.compiler.compile``, which torch has made a ninja build, with flags of their own.
So neither torch's ninja writer is copied nor its CUDA version check can stop a build; the check is
needless here, because the kernels link a static CUDA runtime and no torch.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from . import ptxas, report
from .extensions import all_sources, describe, newest_header
from .jobs import choose_jobs
from .lock import alone_in
from .log import say
from .progress import Progress
from .switches import Switches
from .toolchain import Toolkit

PACKAGE = "flash_attn_ext"
BUILD_INFO = "_build_info.json"


@dataclass(frozen=True)
class BuildContext:
    """What the command needs to know.

    Attributes:
        root: the repository.
        torch: the imported torch.
        switches: the person's switches.
        toolkit: the CUDA toolkit, None for a build without kernels.
        cxx: the C++ compiler.
        facts: returns what ``_build_info.json`` says besides measurements.
    """

    root: Path
    torch: ModuleType
    switches: Switches
    toolkit: Toolkit | None
    cxx: str
    facts: Callable[[], Mapping[str, Any]]

    @property
    def build(self) -> Path:
        """The folder of everything that is not shipped."""
        return self.root / "build"


def provide_ninja() -> None:
    """Puts ninja on the PATH: pip runs builds of a virtual environment that is not activated.

    Raises:
        SystemExit: there is no ninja.
    """
    if shutil.which("ninja"):
        return
    try:
        import ninja
    except ImportError:
        raise SystemExit("ninja is needed to build flash_attn_ext: pip install ninja") from None
    os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{os.environ.get('PATH', '')}"


def _write_launcher(path: Path, context: BuildContext, compiler: str) -> str:
    """Writes a script that runs one compiler under measured.py; returns its path."""
    measured = Path(__file__).with_name("measured.py")
    words = [sys.executable, "-I", str(measured), str(context.build / "ptxas")]
    words += ["1" if context.switches.verbose else "0"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} {compiler} "$@"\n')
    path.chmod(0o755)
    return str(path)


def install_launchers(context: BuildContext) -> None:
    """Makes torch and setuptools call the compilers through measured.py."""
    tools = context.build / "tools"
    os.environ["CXX"] = _write_launcher(tools / "c++", context, context.cxx)
    if context.toolkit:
        nvcc = os.environ.get("PYTORCH_NVCC") or shlex.quote(str(context.toolkit.nvcc))
        os.environ["PYTORCH_NVCC"] = _write_launcher(tools / "nvcc", context, nvcc)


def make_build_ext(context: BuildContext) -> type[build_ext]:
    """Returns the command class; a function because torch is known only while setup.py runs."""
    from torch.utils.cpp_extension import BuildExtension as base

    class BuildExt(base):
        """Builds the shared objects of flash_attn_ext and writes their description."""

        progress: Progress | None = None

        def finalize_options(self) -> None:
            super().finalize_options()
            # One fixed folder, also for editable installs, which would use a temporary one: ninja
            # then rebuilds only what changed.
            self.build_temp = str(context.build / "objects")

        def run(self) -> None:
            with alone_in(context.build):
                self._run()

        def _run(self) -> None:
            start = time.monotonic()
            provide_ninja()
            install_launchers(context)
            package = Path(self.build_lib) / PACKAGE
            if self.inplace:
                package = context.root / PACKAGE
                for outdated in package.glob("_sm*.so"):
                    outdated.unlink()
            super().run()
            self._finish(package, start)

        def build_extensions(self) -> None:
            jobs = choose_jobs(os.environ, context.switches.gb_per_job)
            say(f"{jobs.count} compilers at once: {jobs.reason}")
            os.environ["MAX_JOBS"] = str(jobs.count)
            if context.torch.version.cuda is None:
                self._drop_outdated_cuda_objects()
            if not context.switches.progress:
                super().build_extensions()
                return
            with Progress(self._records(), jobs.count, say) as self.progress:
                super().build_extensions()

        def build_extension(self, extension: Extension) -> None:
            objects = Path(self.build_temp)
            # A folder for each extension: plan.cpp is compiled for several, with other flags.
            self.build_temp = str(objects / describe(extension))
            cuda_sources = getattr(extension, "cuda_sources", [])
            try:
                if cuda_sources:
                    compiled = self.compiler.compile(
                        cuda_sources,
                        output_dir=self.build_temp,
                        include_dirs=extension.include_dirs,
                        extra_postargs=cast("Any", extension.extra_compile_args),
                    )
                    extension.extra_objects = [*compiled, *extension.extra_objects]
                super().build_extension(extension)
            finally:
                self.build_temp = str(objects)
            if self.progress:
                prefix = f"{describe(extension)}/"
                self.progress.finish(n for n in self._records() if n.startswith(prefix))

        def get_ext_filename(self, ext_name: str) -> str:
            *folders, name = ext_name.split(".")
            for extension in self.extensions or []:
                if describe(extension) == name and hasattr(extension, "file_name"):
                    return os.path.join(*folders, extension.file_name)
            return str(super().get_ext_filename(ext_name))  # type: ignore[no-untyped-call]

        def get_export_symbols(self, extension: Extension) -> list[str]:
            return []

        def _records(self) -> dict[str, Path]:
            """The launcher's record of every object, by the name that is shown."""
            folder = context.build / "objects"
            return {
                f"{describe(extension)}/{Path(source).stem}": (
                    folder / describe(extension) / source
                ).with_suffix(".o.json")
                for extension in self.extensions or []
                for source in all_sources(extension)
                if Path(source).stem != "empty"
            }

        def _drop_outdated_cuda_objects(self) -> None:
            """Removes .cu objects older than a header.

            Under a torch without CUDA its ninja file tracks no headers for nvcc.
            """
            newest = newest_header(context.root)
            for extension in self.extensions or []:
                for source in getattr(extension, "cuda_sources", []):
                    path = context.build / "objects" / describe(extension) / source
                    target = path.with_suffix(".o")
                    if target.exists() and target.stat().st_mtime_ns < newest:
                        target.unlink()

        def _finish(self, package: Path, start: float) -> None:
            libraries = sorted(package.glob("_*.so"))
            logs = [
                log
                for extension in self.extensions or []
                for source in getattr(extension, "cuda_sources", [])
                if (log := context.build / "ptxas" / f"{Path(source).stem}.log").exists()
            ]
            result = report.BuildResult(
                objects=report.read_costs(self._records()),
                libraries={path.name: path.stat().st_size for path in libraries},
                kernels=ptxas.read_logs(logs),
                warnings=report.read_warnings(logs),
                seconds=time.monotonic() - start,
            )
            facts = {**context.facts(), "glibc_min": report.glibc_min(libraries)}
            package.mkdir(parents=True, exist_ok=True)
            text = json.dumps(report.build_info(facts, result), indent=1) + "\n"
            (package / BUILD_INFO).write_text(text)
            say(report.table(result))

    return BuildExt
