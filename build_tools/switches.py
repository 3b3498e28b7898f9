"""The environment variables that steer a build, read once into one value.

=====================================  =========================================================
FLASH_ATTN_EXT_FORCE_BUILD             compile even if a prebuilt wheel fits
FLASH_ATTN_EXT_SKIP_CUDA               build no kernel library
FLASH_ATTN_EXT_REQUIRE_CUDA            fail if no kernel library can be built (CI, images)
FLASH_ATTN_EXT_NVCC                    an nvcc, a toolkit folder, or "pip": bring one for the build
FLASH_ATTN_EXT_ARCHS                   "80;90a", "sm80 sm90" or "all"
FLASH_ATTN_EXT_GB_PER_JOB              memory to allow for one compiler, in GiB
FLASH_ATTN_EXT_PROGRESS                0: no progress line
FLASH_ATTN_EXT_LOCAL_VERSION           text after the "+" of the version
FLASH_ATTN_EXT_WHEEL                   a wheel to use: path or URL
FLASH_ATTN_EXT_WHEEL_INDEX             folder URL that holds an index.json of wheels
FLASH_ATTN_EXT_PYBIND                  0: leave out the introspection module
FLASH_ATTN_EXT_INTROSPECT_PYTHONS      further interpreters to build the introspection module for
FLASH_ATTN_EXT_VERBOSE                 show all compiler output
=====================================  =========================================================

flash-attn's FLASH_ATTENTION_FORCE_BUILD and FLASH_ATTENTION_SKIP_CUDA_BUILD are understood too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_PREFIX = "FLASH_ATTN_EXT_"
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}
_FLASH_ATTN_SPELLINGS = {
    "FORCE_BUILD": "FLASH_ATTENTION_FORCE_BUILD",
    "SKIP_CUDA": "FLASH_ATTENTION_SKIP_CUDA_BUILD",
}


class SwitchError(ValueError):
    """An environment variable holds a value that cannot be understood."""


@dataclass(frozen=True)
class Switches:
    """The switches of one build; see the module's table."""

    force_build: bool = False
    skip_cuda: bool = False
    require_cuda: bool = False
    nvcc: str = ""
    archs: str = ""
    torch_cuda_arch_list: str = ""
    gb_per_job: float = 0.0
    progress: bool = True
    local_version: str = ""
    wheel: str = ""
    wheel_index: str = ""
    pybind: bool = True
    introspect_pythons: tuple[str, ...] = ()
    verbose: bool = False


def parse_bool(name: str, text: str) -> bool:
    """Reads 1/true/yes/on and 0/false/no/off, in any case.

    Raises:
        SwitchError: the text is neither.
    """
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise SwitchError(
        f"{name}={text!r} is not understood; expected 1/true/yes/on or 0/false/no/off"
    )


def read_switches(env: Mapping[str, str], notice: Callable[[str], None]) -> Switches:
    """Reads all switches from the environment.

    Args:
        env: the environment, usually ``os.environ``.
        notice: called with a sentence when a spelling of flash-attn was used.

    Raises:
        SwitchError: a value cannot be understood, or two switches contradict each other.
    """

    def flag(name: str, default: bool = False) -> bool:
        ours = _PREFIX + name
        if ours in env:
            return parse_bool(ours, env[ours])
        theirs = _FLASH_ATTN_SPELLINGS.get(name, "")
        if theirs in env:
            value = parse_bool(theirs, env[theirs])
            notice(f"{theirs}={env[theirs]} is read as {ours}={int(value)}")
            return value
        return default

    def text(name: str) -> str:
        return env.get(_PREFIX + name, "").strip()

    try:
        gb_per_job = float(text("GB_PER_JOB") or 0)
    except ValueError:
        gb_per_job = -1.0
    if gb_per_job < 0:
        raise SwitchError(
            f"{_PREFIX}GB_PER_JOB={text('GB_PER_JOB')!r} is not understood; expected GiB, e.g. 1.5"
        )
    switches = Switches(
        force_build=flag("FORCE_BUILD"),
        skip_cuda=flag("SKIP_CUDA"),
        require_cuda=flag("REQUIRE_CUDA"),
        nvcc=text("NVCC"),
        archs=text("ARCHS"),
        torch_cuda_arch_list=env.get("TORCH_CUDA_ARCH_LIST", "").strip(),
        gb_per_job=gb_per_job,
        progress=flag("PROGRESS", default=True),
        local_version=text("LOCAL_VERSION"),
        wheel=text("WHEEL"),
        wheel_index=text("WHEEL_INDEX"),
        pybind=flag("PYBIND", default=True),
        introspect_pythons=tuple(text("INTROSPECT_PYTHONS").split()),
        verbose=flag("VERBOSE"),
    )
    if switches.skip_cuda and switches.require_cuda:
        raise SwitchError(
            f"{_PREFIX}SKIP_CUDA and {_PREFIX}REQUIRE_CUDA are both on; unset one of them"
        )
    return switches
