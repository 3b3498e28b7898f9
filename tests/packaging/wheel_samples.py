"""A machine and a wheel that fits it, for the tests of pick.py and setup.py."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pick

NAME = "flash_attn_ext-1.2.0+cu13torch2.10cxx11abitrue-cp310-abi3-linux_x86_64.whl"
MANYLINUX = NAME.replace("linux_x86_64", "manylinux_2_28_x86_64")

MACHINE = pick.Machine(
    system="linux",
    processor="x86_64",
    glibc=(2, 36),
    python=(3, 11),
    implementation="cp",
    torch=(2, 13),
    cxx11abi=True,
    gpus=((9, 0),),
    driver_cuda=(13, 0),
    version="1.2.0",
    source_hash="cpp",
    python_hash="py",
)

INFO = {
    "version": "1.2.0+cu13torch2.10cxx11abiTRUE",
    "cuda": "13.0",
    "driver_min": "580",
    "torch_min": "2.10",
    "cxx11abi": True,
    "glibc_min": "2.34",
    "archs": ["sm80", "sm90"],
    "source_hash": "cpp",
    "python_hash": "py",
}


def write_wheel(folder: Path, name: str = NAME, **changes: Any) -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(pick.BUILD_INFO, json.dumps({**INFO, **changes}))
    return path
