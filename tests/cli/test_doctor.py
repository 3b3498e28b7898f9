"""Every failure that doctor knows, driven by an environment that has just that failure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flash_attn_ext.cli import _environment, doctor, main
from flash_attn_ext.cli._environment import Environment, Gpu, Toolkit
from flash_attn_ext.cli.doctor import Check

H100 = Gpu("NVIDIA H100", (9, 0), 80.0)
BUILD_INFO = {
    "version": "0.1.0",
    "torch_min": "2.10",
    "glibc_min": "2.34",
    "driver_min": "580",
    "cuda": "13.0",
}
HEALTHY = Environment(
    python="3.11.9",
    system="Linux x86_64",
    glibc="2.36",
    version="0.1.0",
    package_dir=Path("/site-packages/flash_attn_ext"),
    redirected_from=None,
    copies=(),
    build_info=BUILD_INFO,
    binder_loaded=True,
    load_problems=(),
    driver_problem="",
    source_problem="",
    arch_libraries=("sm80", "sm90"),
    arch_names=("sm80", "sm90"),
    introspect=True,
    torch_version="2.13.0+cu130",
    torch_cuda="13.0",
    torch_cxx11abi=True,
    driver="580.95.05",
    gpus=(H100, H100),
    cuda_available=True,
    cuda_error=None,
    toolkit=Toolkit(Path("/usr/local/cuda"), (13, 0), "nvcc on the PATH"),
    toolkit_refused=(),
    nvcc_on_path=Path("/usr/local/cuda/bin/nvcc"),
    ninja="1.13.0",
    num_jobs=8,
    jobs_reason="8 processors",
    memory_gib=60.0,
    disk_gib=100.0,
)


def environment(**changes: Any) -> Environment:
    return dataclasses.replace(HEALTHY, **changes)


def test_a_healthy_machine_has_no_complaint() -> None:
    answers = doctor.examine(HEALTHY)
    assert {answer.state for answer in answers} <= {"ok", "info"}
    assert not any(answer.fix for answer in answers)
    assert sum(answer.name == "kernels for NVIDIA H100" for answer in answers) == 1


def test_a_machine_without_gpu_has_no_complaint() -> None:
    env = environment(
        torch_version="2.13.0+cpu",
        torch_cuda=None,
        driver=None,
        gpus=(),
        cuda_available=False,
        arch_libraries=(),
        binder_loaded=False,
        toolkit=None,
        nvcc_on_path=None,
    )
    assert {answer.state for answer in doctor.examine(env)} <= {"ok", "info"}


def test_a_cuda_torch_without_driver_has_no_complaint() -> None:
    env = environment(driver=None, gpus=(), cuda_available=False)
    assert {answer.state for answer in doctor.examine(env)} <= {"ok", "info"}
    assert "no NVIDIA driver answers" in doctor.check_torch_cuda(env).found


FAILURES: list[tuple[str, dict[str, Any], str, str, list[str], str]] = [
    # name, changes, check, state, words of the cause, words of the fix
    ("old Python", {"python": "3.9.1"}, "python", "error", ["3.9.1", ">= 3.10"], "pip install ."),
    ("Windows", {"system": "Windows AMD64", "glibc": None}, "python", "warning", ["Linux"], ""),
    (
        "old glibc",
        {"glibc": "2.28"},
        "python",
        "error",
        ["glibc 2.28", ">= 2.34"],
        "FLASH_ATTN_EXT_FORCE_BUILD=1",
    ),
    (
        "old torch",
        {"torch_version": "2.9.1+cu128"},
        "torch",
        "error",
        ["2.9.1", ">= 2.10"],
        "pip install -U 'torch>=2.10'",
    ),
    (
        "old string ABI",
        {"torch_cxx11abi": False},
        "torch",
        "error",
        ["_GLIBCXX_USE_CXX11_ABI=0"],
        "pip install",
    ),
    (
        "source tree",
        {"build_info": None, "binder_loaded": False, "package_dir": Path("/repo/flash_attn_ext")},
        "installed package",
        "error",
        ["imported from the source tree /repo/flash_attn_ext", "no installed copy"],
        "cd /repo && pip install .",
    ),
    (
        "source tree on request",
        {"build_info": None, "variables": {"FLASH_ATTN_EXT_SOURCE_TREE": "1"}},
        "installed package",
        "warning",
        ["FLASH_ATTN_EXT_SOURCE_TREE"],
        "unset FLASH_ATTN_EXT_SOURCE_TREE",
    ),
    (
        "two copies",
        {"copies": (Path("/other/flash_attn_ext"),)},
        "one copy",
        "error",
        ["/site-packages/flash_attn_ext", "/other/flash_attn_ext"],
        "pip uninstall -y flash_attn_ext",
    ),
    (
        "library does not load",
        {"binder_loaded": False, "load_problems": ("_C: undefined symbol; fix: pip install x.",)},
        "compiled library",
        "error",
        ["_C: undefined symbol"],
        "pip install x",
    ),
    (
        "old sources",
        {"source_problem": "built from other sources; fix: pip install ."},
        "sources",
        "error",
        ["other sources"],
        "pip install .",
    ),
    (
        "CPU-only torch beside a GPU",
        {"torch_version": "2.13.0+cpu", "torch_cuda": None, "cuda_available": False},
        "torch and GPU",
        "error",
        ["CPU-only", "NVIDIA H100"],
        "pip install --force-reinstall torch",
    ),
    (
        "hidden GPUs",
        {"cuda_available": False, "variables": {"CUDA_VISIBLE_DEVICES": ""}},
        "torch and GPU",
        "warning",
        ["CUDA_VISIBLE_DEVICES"],
        "unset CUDA_VISIBLE_DEVICES",
    ),
    (
        "torch and driver do not fit",
        {"cuda_available": False, "driver": "525.1"},
        "torch and GPU",
        "error",
        ["CUDA 13.0", "driver 525.1"],
        "torch.cuda.init()",
    ),
    (
        "first kernel fails",
        {"cuda_error": "CUDA error: out of memory"},
        "torch and GPU",
        "error",
        ["out of memory"],
        "nvidia-smi",
    ),
    (
        "old driver",
        {"driver_problem": "need an NVIDIA driver >= 580; fix: update the driver."},
        "driver",
        "error",
        ["driver >= 580"],
        "update the driver",
    ),
    (
        "no library for the GPU",
        {"arch_libraries": ()},
        "kernels for NVIDIA H100",
        "error",
        ["sm90 would use", "lacks sm80, sm90", "has: none"],
        "FLASH_ATTN_EXT_ARCHS=90",
    ),
    (
        "only the older library",
        {"arch_libraries": ("sm80",)},
        "kernels for NVIDIA H100",
        "warning",
        ["lacks sm90"],
        "FLASH_ATTN_EXT_ARCHS=90",
    ),
    (
        "GPU older than any kernel",
        {"gpus": (Gpu("Tesla T4", (7, 5), 16.0),)},
        "kernels for Tesla T4",
        "warning",
        ["sm75 is older than sm80"],
        "",
    ),
    (
        "no introspection",
        {"introspect": False, "arch_names": None},
        "introspection",
        "warning",
        ["Python 3.11.9"],
        "pip install pybind11",
    ),
    (
        "no nvcc though kernels are missing",
        {"toolkit": None, "toolkit_refused": ("CUDA_HOME=/x: no nvcc",), "arch_libraries": ()},
        "nvcc",
        "error",
        ["CUDA_HOME=/x: no nvcc"],
        "FLASH_ATTN_EXT_NVCC=pip",
    ),
    ("no nvcc", {"toolkit": None}, "nvcc", "info", ["only to build"], ""),
    (
        "wrapper of nvcc",
        {"nvcc_on_path": Path("/opt/bin/nvcc")},
        "nvcc",
        "warning",
        ["/opt/bin/nvcc", "a wrapper or another toolkit"],
        "export CUDA_HOME=/usr/local/cuda",
    ),
    (
        "nvcc of another CUDA than torch",
        {"torch_cuda": "12.8"},
        "nvcc",
        "info",
        ["CUDA 13.0", "torch has CUDA 12.8"],
        "",
    ),
    ("no ninja", {"ninja": None}, "ninja", "warning", ["does not run"], "pip install ninja"),
    (
        "little memory",
        {"memory_gib": 1.0, "num_jobs": 1},
        "memory",
        "warning",
        ["MAX_JOBS=1", "may be killed"],
        "wheels/pick.py",
    ),
    ("little room", {"disk_gib": 0.5}, "disk", "warning", ["0.5 GiB free"], "TMPDIR="),
    (
        "misspelt variable",
        {"variables": {"FLASH_ATTN_EXT_BACKENDS": "tiled"}},
        "environment",
        "error",
        ["nothing reads FLASH_ATTN_EXT_BACKENDS=tiled", "did you mean FLASH_ATTN_EXT_BACKEND?"],
        "unset FLASH_ATTN_EXT_BACKENDS; export FLASH_ATTN_EXT_BACKEND=tiled",
    ),
    (
        "unknown variable",
        {"variables": {"FLASH_ATTN_EXT_": "1"}},
        "environment",
        "error",
        ["nothing reads FLASH_ATTN_EXT_=1"],
        "unset FLASH_ATTN_EXT_",
    ),
    (
        "value not understood",
        {"variables": {"FLASH_ATTN_EXT_FALLBACK": "never"}},
        "environment",
        "error",
        ["FLASH_ATTN_EXT_FALLBACK=never", "warn, allow, error"],
        "unset FLASH_ATTN_EXT_FALLBACK",
    ),
]


@pytest.mark.parametrize(
    ("changes", "name", "state", "causes", "fix"),
    [failure[1:] for failure in FAILURES],
    ids=[failure[0] for failure in FAILURES],
)
def test_failure(
    changes: dict[str, Any], name: str, state: str, causes: list[str], fix: str
) -> None:
    answers = [a for a in doctor.examine(environment(**changes)) if a.name == name]
    answer = next(a for a in answers if a.state == state)
    for cause in causes:
        assert cause in answer.found
    assert fix in answer.fix
    assert bool(fix) == bool(answer.fix)


def test_facts_are_told_without_judgement() -> None:
    env = environment(
        neighbours={"xformers": "0.0.40", "transformers": "5.17.0"},
        variables={"FLASH_ATTN_EXT_BACKEND": "tiled", "MAX_JOBS": "4"},
        redirected_from=Path("/repo/flash_attn_ext"),
    )
    answers = doctor.examine(env)
    text = "\n".join(answer.found for answer in answers)
    assert "xformers 0.0.40, transformers 5.17.0" in text
    assert "FLASH_ATTN_EXT_BACKEND=tiled" in text
    assert "MAX_JOBS=4" in text
    assert "instead of the bare source tree /repo/flash_attn_ext" in text
    assert {answer.state for answer in answers} <= {"ok", "info"}


@pytest.mark.parametrize(("ninja", "code"), [("1.13.0", 0), (None, 0)])
def test_warnings_do_not_fail(
    ninja: str | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_environment, "collect", lambda: environment(ninja=ninja))
    assert main(["doctor"]) == code
    assert "nothing is wrong" in capsys.readouterr().out


def test_an_error_fails_and_shows_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_environment, "collect", lambda: environment(torch_version="2.9.0"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "torch 2.9.0 is too old" in out
    assert "fix: pip install -U 'torch>=2.10'" in out
    assert "1 of" in out


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_environment, "collect", lambda: environment(python="3.9.0"))
    assert main(["doctor", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert [c["name"] for c in document["checks"] if c["state"] == "error"] == ["python"]
    assert document["environment"]["torch_version"] == "2.13.0+cu130"


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Gathers the real facts; whatever they are, every error names a fix."""
    env = _environment.collect()
    answers = doctor.examine(env)
    assert [a for a in answers if a.state == "error" and not a.fix] == []
    assert all(isinstance(answer, Check) for answer in answers)
    code = main(["doctor"])
    assert code == int(any(answer.state == "error" for answer in answers))
    assert f"torch {env.torch_version}" in capsys.readouterr().out
