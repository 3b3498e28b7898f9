"""Which kernel libraries to build.

A library is named after the oldest GPU that runs it. ``_sm80`` carries SM80 code and PTX, so every
later GPU runs it too; ``_sm90`` uses instructions that only compute capability 9.0 has.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ArchLibrary:
    """One kernel library.

    Attributes:
        name: "sm80"; the shared object is ``_sm80.abi3.so``, the sources are ``sm80_*.cu``.
        gencode: the flags of nvcc that choose the code in it.
        min_nvcc: the first CUDA toolkit that compiles it.
    """

    name: str
    gencode: tuple[str, ...]
    min_nvcc: tuple[int, int]


ARCH_LIBRARIES = {
    library.name: library
    for library in (
        ArchLibrary("sm80", ("-gencode", "arch=compute_80,code=[sm_80,compute_80]"), (12, 0)),
        ArchLibrary("sm89", ("-gencode", "arch=compute_89,code=sm_89"), (12, 0)),
        ArchLibrary("sm90", ("-gencode", "arch=compute_90a,code=sm_90a"), (12, 3)),
    )
}


@dataclass(frozen=True)
class ArchChoice:
    """The libraries to build and why these.

    Attributes:
        names: e.g. ("sm80", "sm90"), in the order of `ARCH_LIBRARIES`.
        reason: where the choice comes from, for the log.
        dropped: one sentence for each thing that was asked for and cannot be built.
    """

    names: tuple[str, ...]
    reason: str
    dropped: tuple[str, ...] = ()


def libraries_for_capability(major: int, minor: int) -> tuple[str, ...]:
    """Returns the libraries that are worth building for a GPU of this compute capability.

    The plan decides at run time which of them a problem uses; a GPU without a library of its own
    runs ``sm80``, from its code (8.x) or from its PTX (9.x and later).
    """
    if major < 8:
        return ()
    if major == 9:
        return ("sm80", "sm90")
    if (major, minor) == (8, 9):
        return ("sm80", "sm89")
    return ("sm80",)


def _parse_word(word: str) -> tuple[int, int] | None:
    """Reads one architecture: "80", "sm_80", "sm90a", "8.6", "9.0a+PTX", "12.0"."""
    text = word.lower().removesuffix("+ptx").removeprefix("compute").removeprefix("sm").lstrip("_")
    match = re.fullmatch(r"(\d+)\.(\d)[af]?|(\d{2,3})[af]?", text)
    if not match:
        return None
    if match[1]:
        return int(match[1]), int(match[2])
    return int(match[3][:-1]), int(match[3][-1])


def _ordered(names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in ARCH_LIBRARIES if name in names)


def parse_archs(text: str, variable: str) -> ArchChoice:
    """Maps a list of architectures to libraries.

    ``FLASH_ATTN_EXT_ARCHS`` names libraries: "80" is ``_sm80`` alone. ``TORCH_CUDA_ARCH_LIST``
    names GPUs: "9.0" wants everything that such a GPU runs.

    Args:
        text: words separated by blanks, commas or semicolons; "all".
        variable: the name of the environment variable the text comes from.
    """
    names: set[str] = set()
    dropped: list[str] = []
    for word in re.split(r"[\s,;]+", text.strip()):
        if word.lower() == "all":
            names |= set(ARCH_LIBRARIES)
            continue
        capability = _parse_word(word)
        if capability is None:
            dropped.append(f"{variable}: {word!r} is not an architecture (like 80, 9.0a); ignored")
            continue
        exact = f"sm{capability[0]}{capability[1]}"
        if variable == "FLASH_ATTN_EXT_ARCHS" and exact in ARCH_LIBRARIES:
            names.add(exact)
            continue
        wanted = libraries_for_capability(*capability)
        if not wanted:
            dropped.append(
                f"{variable}: no kernel runs on compute capability {capability[0]}.{capability[1]} "
                "(8.0 is the oldest); ignored"
            )
        names |= set(wanted)
    return ArchChoice(_ordered(names), f"{variable}={text}", tuple(dropped))


def visible_capabilities() -> list[tuple[int, int]]:
    """Returns the compute capability of each GPU of this machine; empty if none can be seen."""
    return _capabilities_of_nvidia_smi() or _capabilities_of_libcuda()


def _capabilities_of_nvidia_smi() -> list[tuple[int, int]]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = re.findall(r"^\s*(\d+)\.(\d+)\s*$", output.stdout, re.MULTILINE)
    return [(int(major), int(minor)) for major, minor in found]


def _capabilities_of_libcuda() -> list[tuple[int, int]]:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    capability_major, capability_minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
    found = []
    for index in range(count.value):
        values = []
        for attribute in (capability_major, capability_minor):
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, index)
            values.append(value.value)
        found.append((values[0], values[1]))
    return found


def choose_archs(
    archs: str,
    torch_cuda_arch_list: str,
    capabilities: Callable[[], Sequence[tuple[int, int]]] = visible_capabilities,
) -> ArchChoice:
    """Chooses the libraries.

    FLASH_ATTN_EXT_ARCHS decides, else TORCH_CUDA_ARCH_LIST, else the visible GPUs, else all.
    """
    if archs:
        return parse_archs(archs, "FLASH_ATTN_EXT_ARCHS")
    dropped: tuple[str, ...] = ()
    if torch_cuda_arch_list:
        choice = parse_archs(torch_cuda_arch_list, "TORCH_CUDA_ARCH_LIST")
        if choice.names:
            return choice
        dropped = choice.dropped
    seen = sorted(set(capabilities()))
    if seen:
        names = {name for capability in seen for name in libraries_for_capability(*capability)}
        gpus = ", ".join(f"{major}.{minor}" for major, minor in seen)
        dropped += tuple(
            f"the GPU of compute capability {major}.{minor} is older than 8.0; no kernel runs on it"
            for major, minor in seen
            if not libraries_for_capability(major, minor)
        )
        return ArchChoice(_ordered(names), f"visible GPUs of compute capability {gpus}", dropped)
    return ArchChoice(tuple(ARCH_LIBRARIES), "no GPU is visible, so all are built", dropped)


def buildable(
    choice: ArchChoice, nvcc_version: tuple[int, int], instances: Path
) -> tuple[dict[str, list[Path]], list[str]]:
    """Returns the sources of each library that can be built, and a sentence for each that cannot.

    Args:
        choice: the libraries asked for.
        nvcc_version: (major, minor) of the CUDA toolkit.
        instances: the folder that holds ``sm80_*.cu`` and so on.
    """
    sources: dict[str, list[Path]] = {}
    left_out: list[str] = []
    for name in choice.names:
        library = ARCH_LIBRARIES[name]
        files = sorted(instances.glob(f"{name}_*.cu"))
        if not files:
            left_out.append(f"_{name}: no instances in the source, so there is no such library")
        elif nvcc_version < library.min_nvcc:
            need = ".".join(map(str, library.min_nvcc))
            have = ".".join(map(str, nvcc_version))
            left_out.append(f"_{name}: needs CUDA toolkit >= {need}, this one is {have}")
        else:
            sources[name] = files
    return sources, left_out
