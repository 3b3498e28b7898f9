from __future__ import annotations

from pathlib import Path

import pytest

from build_tools import archs
from build_tools.archs import ArchChoice, buildable, choose_archs, parse_archs


def no_gpu() -> list[tuple[int, int]]:
    return []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("80", ("sm80",)),
        ("80;90a", ("sm80", "sm90")),
        ("sm_90a sm_80", ("sm80", "sm90")),
        ("sm90", ("sm90",)),
        ("8.0,9.0", ("sm80", "sm90")),
        ("89", ("sm89",)),
        ("86", ("sm80",)),
        ("120", ("sm80",)),
        ("all", ("sm80", "sm89", "sm90")),
    ],
)
def test_our_variable_names_libraries(text: str, names: tuple[str, ...]) -> None:
    choice = parse_archs(text, "FLASH_ATTN_EXT_ARCHS")
    assert choice.names == names
    assert choice.dropped == ()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8.0", ("sm80",)),
        ("8.6+PTX", ("sm80",)),
        ("8.9", ("sm80", "sm89")),
        ("9.0a", ("sm80", "sm90")),
        ("10.0;12.0", ("sm80",)),
        ("8.0 8.6 9.0+PTX", ("sm80", "sm90")),
    ],
)
def test_torch_variable_names_gpus(text: str, names: tuple[str, ...]) -> None:
    assert parse_archs(text, "TORCH_CUDA_ARCH_LIST").names == names


def test_unknown_ones_are_dropped_with_a_line() -> None:
    choice = parse_archs("7.5;Hopper;9.0", "TORCH_CUDA_ARCH_LIST")
    assert choice.names == ("sm80", "sm90")
    assert choice.dropped == (
        "TORCH_CUDA_ARCH_LIST: no kernel runs on compute capability 7.5 (8.0 is the oldest); "
        "ignored",
        "TORCH_CUDA_ARCH_LIST: 'Hopper' is not an architecture (like 80, 9.0a); ignored",
    )


def test_order_of_the_sources() -> None:
    def gpu() -> list[tuple[int, int]]:
        return [(8, 6)]

    assert choose_archs("90a", "8.0", gpu).names == ("sm90",)
    assert choose_archs("", "9.0", gpu).names == ("sm80", "sm90")
    assert choose_archs("", "", gpu).names == ("sm80",)
    everything = choose_archs("", "", no_gpu)
    assert everything.names == ("sm80", "sm89", "sm90")
    assert "no GPU is visible" in everything.reason


def test_a_torch_list_without_any_usable_gpu_falls_through() -> None:
    choice = choose_archs("", "7.0 7.5", no_gpu)
    assert choice.names == ("sm80", "sm89", "sm90")
    assert len(choice.dropped) == 2


def test_gpus_of_several_kinds_and_an_old_one() -> None:
    choice = choose_archs("", "", lambda: [(9, 0), (8, 9), (7, 5), (9, 0)])
    assert choice.names == ("sm80", "sm89", "sm90")
    assert choice.reason == "visible GPUs of compute capability 7.5, 8.9, 9.0"
    assert choice.dropped == (
        "the GPU of compute capability 7.5 is older than 8.0; no kernel runs on it",
    )


def test_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 9.0\necho 8.6\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert archs.visible_capabilities() == [(9, 0), (8, 6)]


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(archs.ctypes, "CDLL", refuse)
    assert archs.visible_capabilities() == []


def test_libcuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    class Cuda:
        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, count) -> int:
            count._obj.value = 1
            return 0

        def cuDeviceGetAttribute(self, value, attribute: int, device: int) -> int:
            value._obj.value = {75: 9, 76: 0}[attribute]
            return 0

    monkeypatch.setattr(archs.ctypes, "CDLL", lambda name: Cuda())
    assert archs.visible_capabilities() == [(9, 0)]


def test_buildable_skips_what_has_no_source_and_what_nvcc_cannot(tmp_path: Path) -> None:
    for name in ("sm80_combine.cu", "sm80_rotary.cu", "sm90_combine.cu"):
        (tmp_path / name).touch()
    choice = ArchChoice(("sm80", "sm89", "sm90"), "test")
    sources, left_out = buildable(choice, (13, 0), tmp_path)
    assert {name: [path.name for path in paths] for name, paths in sources.items()} == {
        "sm80": ["sm80_combine.cu", "sm80_rotary.cu"],
        "sm90": ["sm90_combine.cu"],
    }
    assert left_out == ["_sm89: no instances in the source, so there is no such library"]
    sources, left_out = buildable(choice, (12, 1), tmp_path)
    assert list(sources) == ["sm80"]
    assert left_out[1] == "_sm90: needs CUDA toolkit >= 12.3, this one is 12.1"
