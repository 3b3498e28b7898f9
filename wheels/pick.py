"""Chooses the prebuilt wheel that fits this machine, and says why the others do not.

    python wheels/pick.py              a table: file, verdict, reason; and the pip command
    python wheels/pick.py --install    installs the wheel that fits
    python wheels/pick.py --json       the same table for programs

Wheels are looked for in this order: ``--wheel`` or FLASH_ATTN_EXT_WHEEL (a path or URL), the files
beside this script, FLASH_ATTN_EXT_WHEEL_INDEX (a folder, as URL, that holds ``index.json`` and the
wheels). setup.py asks the same functions, so ``pip install .`` uses a wheel that fits.

pip cannot choose by itself: a wheel's name says nothing about torch, CUDA or the GPU, and among
local versions pip takes the highest, not the matching one. Needs the standard library alone; every
failure, from a missing network to a damaged file, is a sentence in the table and no exception.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD_INFO = "flash_attn_ext/_build_info.json"
TIMEOUT_SECONDS = 10
_HASH_CHUNK = 1 << 20


# ---------------------------------------------------------------------------------------- hashes


def _hash_files(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _files(folder: Path, pattern: str) -> list[Path]:
    return [
        path for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts
    ]


def source_hash(root: Path = ROOT) -> str:
    """Returns the sha256 of everything the compiled libraries are made from.

    That is csrc/, setup.py and build_tools/. A wheel that carries another hash was built from other
    sources; without this check whoever edits a kernel and installs would get yesterday's wheel.
    """
    files = [*_files(root / "csrc", "*"), *_files(root / "build_tools", "*.py"), root / "setup.py"]
    return _hash_files(root, [path for path in files if path.exists()])


def python_hash(root: Path = ROOT) -> str:
    """Returns the sha256 of the package's Python files, which a wheel carries as well."""
    return _hash_files(root, _files(root / "flash_attn_ext", "*.py"))


def file_hash(path: Path) -> str:
    """Returns the sha256 of one file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------- this machine


@dataclass(frozen=True)
class Machine:
    """What a wheel must fit.

    Attributes:
        system: "linux".
        processor: "x86_64".
        glibc: (2, 36), or None where there is none.
        python: (3, 11).
        implementation: "cp" for CPython.
        torch: (2, 13), or None without torch.
        cxx11abi: of torch; None without torch.
        gpus: compute capabilities of the visible GPUs.
        driver_cuda: newest CUDA the driver supports, (13, 0); None without a driver.
        version: of the source, None if only a wheel's own fit matters.
        source_hash: of the source, None likewise.
        python_hash: of the source, None likewise.
        wanted_archs: libraries that must be in the wheel, e.g. ("sm90",).
    """

    system: str
    processor: str
    glibc: tuple[int, ...] | None
    python: tuple[int, int]
    implementation: str
    torch: tuple[int, ...] | None
    cxx11abi: bool | None
    gpus: tuple[tuple[int, int], ...] = ()
    driver_cuda: tuple[int, int] | None = None
    version: str | None = None
    source_hash: str | None = None
    python_hash: str | None = None
    wanted_archs: tuple[str, ...] = ()


def numbers(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _glibc() -> tuple[int, ...] | None:
    name, version = platform.libc_ver()
    return numbers(version) if name == "glibc" else None


def _ask_driver() -> tuple[tuple[int, int] | None, tuple[tuple[int, int], ...]]:
    """Returns the driver's newest CUDA and the GPUs' compute capabilities, without torch."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, ()
    version = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None, ()
    newest = (version.value // 1000, version.value % 1000 // 10)
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return newest, ()
    gpus = []
    for index in range(count.value):
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, index)  # COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, index)  # COMPUTE_CAPABILITY_MINOR
        gpus.append((major.value, minor.value))
    return newest, tuple(gpus)


def source_version(root: Path = ROOT) -> str | None:
    """Returns the version that the source beside this script has."""
    try:
        text = (root / "flash_attn_ext" / "_version.py").read_text()
    except OSError:
        return None
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    return match[1] if match else None


def this_machine(root: Path = ROOT) -> Machine:
    """Looks at this machine; torch is imported if it is there, no CUDA context is made."""
    torch_version: tuple[int, ...] | None = None
    cxx11abi: bool | None = None
    try:
        import torch

        torch_version = numbers(str(torch.__version__))[:2]
        cxx11abi = bool(torch._C._GLIBCXX_USE_CXX11_ABI)
    except (ImportError, OSError):
        pass
    driver_cuda, gpus = _ask_driver()
    has_source = (root / "csrc").is_dir()
    return Machine(
        system=sys.platform,
        processor=platform.machine(),
        glibc=_glibc(),
        python=(sys.version_info.major, sys.version_info.minor),
        implementation="cp" if platform.python_implementation() == "CPython" else "py",
        torch=torch_version,
        cxx11abi=cxx11abi,
        gpus=gpus,
        driver_cuda=driver_cuda,
        version=source_version(root),
        source_hash=source_hash(root) if has_source else None,
        python_hash=python_hash(root) if has_source else None,
    )


# -------------------------------------------------------------------------------------- one wheel


@dataclass
class Candidate:
    """A wheel and what is known about it.

    Attributes:
        file: the file name.
        origin: where it was found, for the table.
        location: path or URL to get it from.
        entry: what index.json, or the wheel itself, says about it.
        verdict: the reason why it does not fit; "" if it fits.
    """

    file: str
    origin: str
    location: str
    entry: dict[str, Any] = field(default_factory=dict)
    verdict: str = ""

    @property
    def fits(self) -> bool:
        """True if nothing speaks against this wheel."""
        return not self.verdict


@dataclass(frozen=True)
class WheelName:
    """The parts of a wheel's file name."""

    version: str
    python_tag: str
    abi_tag: str
    platforms: tuple[str, ...]


def parse_name(file: str) -> WheelName | None:
    """Splits a wheel's file name; None if it is not a wheel of this package."""
    match = re.fullmatch(r"flash_attn_ext-([^-/]+)-([^-/]+)-([^-/]+)-([^-/]+)\.whl", file)
    if not match:
        return None
    return WheelName(match[1], match[2], match[3], tuple(match[4].split(".")))


def entry_from_wheel(path: Path) -> dict[str, Any]:
    """Reads a wheel's own description: its name and the ``_build_info.json`` inside.

    Raises:
        ValueError: the file is damaged, is no wheel of this package or carries no description.
    """
    name = parse_name(path.name)
    if name is None:
        raise ValueError(f"{path.name} is not a wheel of flash_attn_ext")
    try:
        with zipfile.ZipFile(path) as wheel:
            info = json.loads(wheel.read(BUILD_INFO))
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path.name} carries no {BUILD_INFO}") from error
    return {
        "file": path.name,
        "sha256": file_hash(path),
        "version": info["version"],
        "cuda": info["cuda"],
        "driver_min": info["driver_min"],
        "torch_min": info["torch_min"],
        "torch_max": None,
        "stable_abi": True,
        "cxx11abi": info["cxx11abi"],
        "python_tag": name.python_tag,
        "abi_tag": name.abi_tag,
        "platform": ".".join(name.platforms),
        "glibc_min": info["glibc_min"],
        "archs": info["archs"],
        "source_hash": info["source_hash"],
        "python_hash": info["python_hash"],
    }


def _platform_refusal(name: WheelName, machine: Machine) -> str:
    reasons = []
    for tag in name.platforms:
        if tag == f"{machine.system}_{machine.processor}" or tag == "any":
            return ""
        match = re.fullmatch(r"manylinux_(\d+)_(\d+)_(.+)", tag)
        if not match or machine.system != "linux" or match[3] != machine.processor:
            reasons.append(f"is for {tag}, this machine is {machine.system}_{machine.processor}")
            continue
        need = (int(match[1]), int(match[2]))
        if machine.glibc is not None and machine.glibc[:2] >= need:
            return ""
        reasons.append(_glibc_reason(need, machine))
    return reasons[0]


def _glibc_reason(need: tuple[int, ...], machine: Machine) -> str:
    have = ".".join(map(str, machine.glibc)) if machine.glibc else "none"
    return f"needs glibc >= {'.'.join(map(str, need))}, this machine has {have}"


def _python_refusal(name: WheelName, machine: Machine) -> str:
    have = f"{machine.implementation}{machine.python[0]}{machine.python[1]}"
    for tag in name.python_tag.split("."):
        match = re.fullmatch(r"(cp|py)(\d)(\d*)", tag)
        if not match:
            continue
        built = (int(match[2]), int(match[3] or 0))
        stable = name.abi_tag in ("abi3", "none")
        same_kind = match[1] in ("py", machine.implementation)
        if same_kind and (machine.python >= built if stable else machine.python == built):
            return ""
    return f"is for Python {name.python_tag}-{name.abi_tag}, this is {have}"


def _torch_refusal(entry: Mapping[str, Any], machine: Machine) -> str:
    if machine.torch is None:
        return ""  # pip installs a torch that fits
    have = ".".join(map(str, machine.torch))
    if machine.torch < numbers(entry["torch_min"]):
        return f"needs torch >= {entry['torch_min']}, this environment has {have}"
    if entry.get("torch_max") and machine.torch > numbers(entry["torch_max"]):
        return f"needs torch <= {entry['torch_max']}, this environment has {have}"
    if machine.cxx11abi is not None and bool(entry["cxx11abi"]) != machine.cxx11abi:
        return f"was built with cxx11abi={entry['cxx11abi']}, torch has {machine.cxx11abi}"
    return ""


def _library_of(gpu: tuple[int, int]) -> str | None:
    """Returns the kernel library a GPU is best served by."""
    if gpu[0] < 8:
        return None
    return "sm90" if gpu[0] == 9 else "sm80"


def _gpu_refusal(entry: Mapping[str, Any], machine: Machine) -> str:
    archs = list(entry["archs"])
    listed = ", ".join(archs) or "none"
    for arch in machine.wanted_archs:
        if arch not in archs:
            return f"has no {arch} kernels, which were asked for (it has: {listed})"
    for gpu in machine.gpus:
        library = _library_of(gpu)
        if library and library not in archs:
            return (
                f"has no {library} kernels for the GPU of compute capability {gpu[0]}.{gpu[1]} "
                f"(it has: {listed})"
            )
    if archs and machine.driver_cuda and machine.driver_cuda[0] < numbers(entry["cuda"])[0]:
        have = ".".join(map(str, machine.driver_cuda))
        return (
            f"was built with CUDA {entry['cuda']} and needs driver >= {entry['driver_min']}, "
            f"this driver supports CUDA {have}"
        )
    return ""


def _source_refusal(entry: Mapping[str, Any], machine: Machine) -> str:
    public = str(entry["version"]).partition("+")[0]
    if machine.version is not None and public != machine.version:
        return f"is version {public}, the source here is {machine.version}"
    if machine.source_hash is not None and entry["source_hash"] != machine.source_hash:
        return "was built from other C++ or build sources than those here (source_hash differs)"
    if machine.python_hash is not None and entry["python_hash"] != machine.python_hash:
        return "was built from other Python files than those here (python_hash differs)"
    return ""


def refusal(file: str, entry: Mapping[str, Any], machine: Machine) -> str:
    """Returns the first reason why a wheel does not fit this machine, or "".

    Order: platform, glibc, Python, torch and its ABI, GPU and driver, sources.
    """
    name = parse_name(file)
    if name is None:
        return "is not a wheel of flash_attn_ext by its name"
    try:
        glibc_min = numbers(str(entry["glibc_min"] or ""))
        return (
            _platform_refusal(name, machine)
            or (
                _glibc_reason(glibc_min, machine)
                if glibc_min and machine.glibc is not None and machine.glibc < glibc_min
                else ""
            )
            or _python_refusal(name, machine)
            or _torch_refusal(entry, machine)
            or _gpu_refusal(entry, machine)
            or _source_refusal(entry, machine)
        )
    except (KeyError, TypeError, IndexError) as error:
        return f"has an incomplete description ({type(error).__name__}: {error})"


# ------------------------------------------------------------------------------------- the search


def _download(url: str, target: Path) -> None:
    """Copies a URL (http, https or file) to a file.

    Raises:
        OSError: it cannot be reached in `TIMEOUT_SECONDS`, or not be written.
    """
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, target.open("wb") as file:
        while chunk := answer.read(_HASH_CHUNK):
            file.write(chunk)


def _is_url(text: str) -> bool:
    return urllib.parse.urlsplit(text).scheme in ("http", "https", "file")


def _local_candidate(
    path: Path, origin: str, index: Mapping[str, Any], machine: Machine
) -> Candidate:
    candidate = Candidate(path.name, origin, str(path))
    try:
        candidate.entry = entry_from_wheel(path)
    except (ValueError, OSError) as error:
        candidate.verdict = f"{error}"
        return candidate
    listed = index.get(path.name)
    if listed is not None and listed.get("sha256") != candidate.entry["sha256"]:
        candidate.verdict = "differs from the sha256 in index.json; download it again"
    else:
        candidate.verdict = refusal(path.name, candidate.entry, machine)
    return candidate


def _explicit_candidate(location: str, machine: Machine, cache: Path) -> Candidate:
    """A wheel that a person named: it must fit the machine, its sources are their choice."""
    file = urllib.parse.unquote(urllib.parse.urlsplit(location).path.rpartition("/")[2])
    candidate = Candidate(file, "named", location)
    any_source = dataclasses.replace(machine, version=None, source_hash=None, python_hash=None)
    path = Path(location)
    if _is_url(location):
        if parse_name(file) is None:
            candidate.verdict = "is not a wheel of flash_attn_ext by its name"
            return candidate
        path = cache / file
        cache.mkdir(parents=True, exist_ok=True)
        try:
            _download(location, path)
        except (OSError, ValueError) as error:
            candidate.verdict = f"cannot be fetched: {error}"
            return candidate
    elif not path.is_file():
        candidate.verdict = "does not exist"
        return candidate
    return _local_candidate(path, "named", {}, any_source)


def _read_index(text: str) -> list[dict[str, Any]]:
    entries = json.loads(text)["wheels"]
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and "file" in entry for entry in entries
    ):
        raise ValueError('expected {"wheels": [{"file": ...}, ...]}')
    return entries


def _index_candidates(base: str, machine: Machine) -> list[Candidate]:
    url = base.rstrip("/") + "/index.json"
    if not _is_url(base):
        reason = f"FLASH_ATTN_EXT_WHEEL_INDEX={base} is not available: it is no http or file URL"
        return [Candidate("index.json", "index", url, verdict=reason)]
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            entries = _read_index(answer.read().decode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [Candidate("index.json", "index", url, verdict=f"{url} is not available: {error}")]
    return [
        Candidate(
            entry["file"],
            "index",
            base.rstrip("/") + "/" + urllib.parse.quote(entry["file"], safe="+"),
            entry,
            refusal(entry["file"], entry, machine),
        )
        for entry in entries
    ]


def find_candidates(
    machine: Machine,
    named: str = "",
    folder: Path = HERE,
    index_url: str = "",
    cache: Path | None = None,
) -> list[Candidate]:
    """Returns every wheel that is there, in the order of preference, each with its verdict.

    Args:
        machine: what must be fitted.
        named: a path or URL that a person gave; nothing else is then looked at.
        folder: where local wheels and index.json are.
        index_url: base URL of an index.
        cache: folder for downloads.
    """
    cache = cache or Path(tempfile.gettempdir()) / "flash_attn_ext_wheels"
    if named:
        return [_explicit_candidate(named, machine, cache)]
    try:
        entries = _read_index((folder / "index.json").read_text())
        listed = {entry["file"]: entry for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        listed = {}
    found = [
        _local_candidate(path, "local", listed, machine)
        for path in sorted(folder.glob("flash_attn_ext-*.whl"))
    ]
    if index_url:
        found += _index_candidates(index_url, machine)
    return found


def obtain(candidate: Candidate, cache: Path) -> Path | None:
    """Returns the local file of a candidate, fetched and checked; None sets its verdict."""
    if candidate.origin != "index":
        # A URL that was named has been fetched already; its candidate then points to the file.
        return Path(candidate.location)
    if parse_name(candidate.file) is None:
        candidate.verdict = "is not a wheel of flash_attn_ext by its name"
        return None
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / candidate.file
    expected = candidate.entry.get("sha256")
    if not (target.exists() and file_hash(target) == expected):
        try:
            _download(candidate.location, target)
        except (OSError, ValueError) as error:
            candidate.verdict = f"cannot be fetched: {error}"
            return None
    if file_hash(target) != expected:
        target.unlink()
        candidate.verdict = "was fetched, but its sha256 is not the one in index.json; not used"
        return None
    return target


def choose(candidates: Sequence[Candidate], cache: Path) -> tuple[Candidate, Path] | None:
    """Returns the first wheel that fits and can be had, as a local file."""
    for candidate in candidates:
        if candidate.fits:
            path = obtain(candidate, cache)
            if path is not None:
                return candidate, path
    return None


# --------------------------------------------------------------------------------------- the table


def table(candidates: Sequence[Candidate]) -> str:
    """Returns the candidates as aligned lines."""
    if not candidates:
        return "No wheels were found."
    width = max(len(candidate.file) for candidate in candidates)
    return "\n".join(
        f"{candidate.file:<{width}}  {'fits' if candidate.fits else 'no  '}  "
        f"{candidate.verdict or candidate.origin}"
        for candidate in candidates
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 if a wheel fits (and, with --install, was installed)."""
    parser = argparse.ArgumentParser(
        description="Choose the prebuilt flash_attn_ext wheel that fits this machine."
    )
    parser.add_argument("--wheel", default=os.environ.get("FLASH_ATTN_EXT_WHEEL", ""))
    parser.add_argument("--index", default=os.environ.get("FLASH_ATTN_EXT_WHEEL_INDEX", ""))
    parser.add_argument("--folder", type=Path, default=HERE, help="folder of local wheels")
    parser.add_argument("--install", action="store_true", help="install the wheel that fits")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument(
        "--any-source",
        action="store_true",
        help="also accept wheels built from other sources than those beside this script",
    )
    options = parser.parse_args(arguments)
    machine = this_machine()
    if options.any_source:
        machine = dataclasses.replace(machine, version=None, source_hash=None, python_hash=None)
    cache = Path(tempfile.gettempdir()) / "flash_attn_ext_wheels"
    candidates = find_candidates(machine, options.wheel, options.folder, options.index, cache)
    chosen: tuple[Candidate, Path] | None = None
    if options.install:
        chosen = choose(candidates, cache)
    fitting = chosen[0] if chosen else next((c for c in candidates if c.fits), None)
    if options.json:
        rows = [dataclasses.asdict(each) | {"fits": each.fits} for each in candidates]
        print(json.dumps({"machine": dataclasses.asdict(machine), "wheels": rows}, indent=2))
    else:
        print(table(candidates))
    if fitting is None:
        if not options.json:
            print("No wheel fits. Build from source: pip install .")
        return 1
    if not options.install:
        if not options.json:
            where = fitting.location if fitting.origin != "index" else "(--install fetches it)"
            print(f"\n{sys.executable} -m pip install --force-reinstall {where}")
        return 0
    assert chosen is not None
    command = [sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps"]
    return subprocess.run([*command, str(chosen[1])], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
