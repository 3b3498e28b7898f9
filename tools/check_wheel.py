"""Checks that a built wheel is what its name says and loads where it claims to load.

    python tools/check_wheel.py dist/flash_attn_ext-*.whl [--installed DIR] [--no-cuda]

- name: cp310-abi3, or one Python for a wheel with a single introspection module that says so; the
  version in the name, in the metadata and in the package agree;
- size: at most 40 MB;
- architecture libraries export fa_get_backend and nothing else, and link no torch and no libcudart;
- the binder links libtorch_cpu, libc10 and the C and C++ runtimes only, so that CPU-only torch can
  load it;
- the entry points that vLLM and SGLang look for lead to a module of the wheel;
- no RPATH, which would point into the machine that built it;
- `torch-abi-audit --check torch`: only the stable ABI of torch is used.

--no-cuda accepts a wheel without architecture libraries. --installed audits that folder instead of
the unpacked wheel.
"""

from __future__ import annotations

import argparse
import configparser
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

MAX_BYTES = 40 * 1000 * 1000
SYSTEM_LIBRARIES = frozenset(
    {
        "libc.so.6",
        "libdl.so.2",
        "libgcc_s.so.1",
        "libm.so.6",
        "libpthread.so.0",
        "librt.so.1",
        "libstdc++.so.6",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    }
)
TORCH_LIBRARIES = frozenset({"libtorch_cpu.so", "libc10.so"})

ENTRY_POINTS = ("vllm.general_plugins", "sglang.srt.plugins")

_WHEEL_NAME = re.compile(
    r"flash_attn_ext-(?P<version>[\w.+]+)-(?P<python>cp3\d+)-(?P<abi>abi3|cp3\d+)"
    r"-(?P<platform>linux_\w+|manylinux\w+)\.whl"
)
_ARCH_LIBRARY = re.compile(r"_sm\d+\.abi3\.so")


def run(*command: str | Path) -> str:
    """Standard output of a command that must succeed."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed_libraries(library: Path) -> set[str]:
    """The sonames that a shared object asks the linker for (DT_NEEDED)."""
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-dW", library)))


def runtime_paths(library: Path) -> list[str]:
    """The RPATH and RUNPATH entries of a shared object."""
    return re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", run("readelf", "-dW", library))


def exported_symbols(library: Path) -> set[str]:
    """The dynamic symbols that a shared object defines."""
    lines = run("nm", "-D", "--defined-only", library).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.strip()}


def library_problems(library: Path) -> list[str]:
    """What is wrong with one shared object of the package."""
    allowed, exports = SYSTEM_LIBRARIES, None
    if _ARCH_LIBRARY.fullmatch(library.name):
        exports = {"fa_get_backend"}
    elif library.name == "_C.abi3.so":
        allowed = SYSTEM_LIBRARIES | TORCH_LIBRARIES
    elif not library.name.startswith("_introspect."):
        return [f"{library.name}: not a library that this package has"]

    found = []
    if surplus := needed_libraries(library) - allowed:
        found.append(f"{library.name}: links {', '.join(sorted(surplus))}")
    if paths := runtime_paths(library):
        found.append(f"{library.name}: has the RPATH {':'.join(paths)}")
    if exports is not None and (actual := exported_symbols(library)) != exports:
        found.append(
            f"{library.name}: exports {', '.join(sorted(actual)[:5]) or 'nothing'} "
            f"({len(actual)} symbols), expected {', '.join(exports)} alone"
        )
    return found


def name_problems(wheel: Path, unpacked: Path) -> list[str]:
    """Disagreement between file name, metadata, tags and the package's own version."""
    match = _WHEEL_NAME.fullmatch(wheel.name)
    if match is None:
        return [f"{wheel.name}: expected flash_attn_ext-VERSION-cp310-abi3-PLATFORM.whl"]
    found = []
    (info,) = unpacked.glob("flash_attn_ext-*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    version = metadata["Version"]
    if version.lower() != match["version"].lower():
        found.append(f"{wheel.name}: its metadata says version {version}")
    source = (unpacked / "flash_attn_ext" / "_version.py").read_text(encoding="utf-8")
    public = re.search(r'__version__ = "([^"]+)"', source)
    if public is None or version.split("+")[0] != public[1]:
        found.append(f"{wheel.name}: flash_attn_ext/_version.py says {public and public[1]}")
    tag = f"{match['python']}-{match['abi']}-{match['platform']}"
    tags = re.findall(r"^Tag: (.+)$", (info / "WHEEL").read_text(encoding="utf-8"), re.MULTILINE)
    if tags != [tag]:
        found.append(f"{wheel.name}: its WHEEL file says {', '.join(tags)}")
    if (match["python"], match["abi"]) != ("cp310", "abi3"):
        found.append(f"{wheel.name}: tag {tag}, expected cp310-abi3")
    return found


def entry_point_problems(unpacked: Path) -> list[str]:
    """Groups without an entry point of ours, and entry points without their module."""
    (info,) = unpacked.glob("flash_attn_ext-*.dist-info")
    listed = configparser.ConfigParser()
    listed.read(info / "entry_points.txt", encoding="utf-8")
    found = [f"no entry point {group}" for group in ENTRY_POINTS if group not in listed]
    for group in listed.sections():
        for target in listed[group].values():
            module = unpacked / (target.partition(":")[0].replace(".", "/") + ".py")
            if not module.is_file():
                found.append(f"entry point {group}: {target} is not in the wheel")
    return found


def abi_problems(folder: Path) -> list[str]:
    """The verdict of torch-abi-audit on a folder of libraries."""
    tool = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    tool = tool or shutil.which("torch-abi-audit")
    if tool is None:
        return ["torch-abi-audit not found: pip install torch-abi-audit"]
    done = subprocess.run(
        [tool, "--check", "torch", str(folder)], capture_output=True, text=True, check=False
    )
    print(done.stdout.strip())
    if done.returncode:
        return [f"torch-abi-audit: exit status {done.returncode} {done.stderr.strip()}"]
    return []


def wheel_problems(wheel: Path, unpacked: Path, *, cuda: bool) -> list[str]:
    """Everything but the ABI audit, for a wheel and the folder it was unpacked to."""
    found = name_problems(wheel, unpacked) + entry_point_problems(unpacked)
    if wheel.stat().st_size > MAX_BYTES:
        found.append(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, at most 40 MB")
    package = unpacked / "flash_attn_ext"
    libraries = sorted(package.rglob("*.so"))
    for library in libraries:
        found += library_problems(library)
    names = [library.name for library in libraries]
    if "_C.abi3.so" not in names:
        found.append("_C.abi3.so is missing: the wheel holds no binder")
    if cuda and not any(_ARCH_LIBRARY.fullmatch(name) for name in names):
        found.append("no architecture library: the wheel was built without nvcc")
    if not (package / "_build_info.json").is_file():
        found.append("_build_info.json is missing")
    if stray := sorted(p.name for p in unpacked.iterdir() if not p.name.startswith("flash_attn_")):
        found.append(f"installs outside the package: {', '.join(stray)}")
    return found


def main(argv: list[str]) -> int:
    """Prints what is wrong with the wheel; 1 if anything is."""
    parser = argparse.ArgumentParser(description="check a built flash_attn_ext wheel")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--installed", type=Path, help="installed package folder to audit")
    parser.add_argument(
        "--no-cuda", action="store_true", help="a wheel without GPU kernels is right"
    )
    options = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder)
        with zipfile.ZipFile(options.wheel) as archive:
            archive.extractall(unpacked)
        found = wheel_problems(options.wheel, unpacked, cuda=not options.no_cuda)
        found += abi_problems(options.installed or unpacked / "flash_attn_ext")
        libraries = sorted(unpacked.rglob("*.so"))
        for library in libraries:
            print(f"{library.stat().st_size / 1e3:>9.0f} kB  {library.name}")
    for problem in found:
        print(f"error: {problem}")
    size = options.wheel.stat().st_size / 1e6
    print(f"wheel: {options.wheel.name}, {size:.2f} MB, {len(found)} errors")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
