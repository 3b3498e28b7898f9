"""Real installations into fresh environments. Minutes each; run with ``pytest -m install``.

Each test copies the sources, so that nothing of an earlier build helps, and installs with pip into
an environment of its own. The environments get the torch version that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TORCH = torch.__version__.partition("+")[0]
CHECK = (
    "import torch, flash_attn_ext as fa\n"
    "from flash_attn_ext import _load\n"
    "q = torch.randn(1, 8, 2, 16)\n"
    "assert torch.isfinite(fa.flash_attn_func(q, q, q, causal=True)).all()\n"
    "status = _load.status()\n"
    "assert status.binder_loaded, status.problems\n"
    "print('at', status.package_dir, 'archs', *status.arch_libraries)\n"
)

pytestmark = [pytest.mark.install, pytest.mark.timeout(1800)]


class Environment:
    """A fresh virtual environment."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"
        self.site = next(folder.glob("lib/python*/site-packages"))

    def run(self, *arguments: str, cwd: Path, **env: str) -> str:
        """Runs this environment's Python; returns all output.

        The PATH has no tools of the environment that runs the tests.
        """
        variables = {k: v for k, v in os.environ.items() if not k.startswith("FLASH_ATTN_EXT_")}
        for name in ("PYTHONPATH", "VIRTUAL_ENV", "CUDA_HOME", "CUDA_PATH", "CXX", "MAX_JOBS"):
            variables.pop(name, None)
        own = str(Path(sys.executable).parent)
        folders = [f for f in variables["PATH"].split(os.pathsep) if f != own]
        variables["PATH"] = os.pathsep.join(folders)
        done = subprocess.run(
            [str(self.python), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**variables, **env},
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def pip(self, *arguments: str, cwd: Path, **env: str) -> str:
        """Installs something with this environment's pip."""
        return self.run("-m", "pip", "install", "-v", *arguments, cwd=cwd, **env)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources without any build result."""
    unwanted = shutil.ignore_patterns(
        ".git", "build", "dist", "*.egg-info", "*.so", "_build_info.json", "*.whl", "__pycache__"
    )
    return shutil.copytree(REPOSITORY, tmp_path / "source", ignore=unwanted, symlinks=True)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment with torch."""
    fresh = Environment(tmp_path / "environment")
    fresh.pip(f"torch=={TORCH}", cwd=tmp_path)
    return fresh


def installed(environment: Environment, cwd: Path) -> str:
    """Computes attention there; returns where the package is and which kernels it has."""
    return environment.run("-c", CHECK, cwd=cwd).splitlines()[-1]


def test_isolated_without_nvcc(environment: Environment, source: Path) -> None:
    out = environment.pip("--no-deps", ".", cwd=source, FLASH_ATTN_EXT_NVCC="/nonexistent/nvcc")
    assert "isolated build: using torch" in out
    assert "the GPU kernels are NOT built" in out
    # From the repository's root, where a folder has the package's name:
    assert installed(environment, source) == f"at {environment.site}/flash_attn_ext archs"
    assert environment.run("-m", "flash_attn_ext", "info", cwd=source)


def test_isolated_with_a_toolkit_that_pip_brings(environment: Environment, source: Path) -> None:
    out = environment.pip(
        "--no-deps", ".", cwd=source, FLASH_ATTN_EXT_NVCC="pip", FLASH_ATTN_EXT_REQUIRE_CUDA="1"
    )
    assert "nvcc installed by pip in" in out
    assert installed(environment, source).endswith("archs sm80 sm90")


def test_into_an_environment_without_torch(tmp_path: Path, source: Path) -> None:
    fresh = Environment(tmp_path / "environment")
    constraint = tmp_path / "constraint.txt"  # holds for the isolated build's torch as well
    constraint.write_text(f"torch=={TORCH}\n")
    fresh.pip(".", cwd=source, FLASH_ATTN_EXT_SKIP_CUDA="1", PIP_CONSTRAINT=str(constraint))
    assert installed(fresh, source) == f"at {fresh.site}/flash_attn_ext archs"


def test_without_isolation_editable_then_wheel_then_reuse(
    environment: Environment, source: Path, tmp_path: Path
) -> None:
    environment.pip("setuptools>=77", "packaging", "ninja", "pybind11", cwd=source)
    environment.pip("--no-deps", "--no-build-isolation", "-e", ".", cwd=source)
    assert installed(environment, tmp_path).startswith(f"at {source}/flash_attn_ext archs")
    environment.run("-m", "pip", "uninstall", "-y", "flash_attn_ext", cwd=source)
    for built in [*source.glob("flash_attn_ext/*.so"), source / "flash_attn_ext/_build_info.json"]:
        built.unlink()

    wheel = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    name = "cu13torch2.10cxx11abiTRUE"
    environment.run(*wheel, cwd=source, FLASH_ATTN_EXT_LOCAL_VERSION=name)
    assert "1 wheels" in environment.run("wheels/make_index.py", cwd=source)
    assert "fits" in environment.run("wheels/pick.py", cwd=source)

    out = environment.pip("--no-deps", ".", cwd=source)
    assert "(FLASH_ATTN_EXT_FORCE_BUILD=1 builds instead)" in out
    assert f"Successfully installed flash_attn_ext-0.1.0+{name.lower()}" in out
    assert installed(environment, source).startswith(f"at {environment.site}/flash_attn_ext archs")

    with (source / "csrc" / "plan" / "plan.cpp").open("a") as file:
        file.write("// edited\n")
    out = environment.pip("--no-deps", "--no-build-isolation", ".", cwd=source)
    assert "was built from other C++ or build sources" in out
    assert "compiler peak" in out


def test_source_distribution_builds(environment: Environment, source: Path, tmp_path: Path) -> None:
    environment.pip("build", "setuptools>=77", "packaging", "ninja", "pybind11", cwd=source)
    environment.run("-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path), cwd=source)
    (sdist,) = tmp_path.glob("flash_attn_ext-*.tar.gz")
    environment.pip("--no-deps", str(sdist), cwd=tmp_path, FLASH_ATTN_EXT_SKIP_CUDA="1")
    assert installed(environment, tmp_path) == f"at {environment.site}/flash_attn_ext archs"
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    assert sorted(path.name for path in root.glob("csrc/kernels/instances/*.cu")) == sorted(
        path.name for path in source.glob("csrc/kernels/instances/*.cu")
    )
