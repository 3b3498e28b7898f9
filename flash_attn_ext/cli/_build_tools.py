"""The modules of build_tools/ that say something about a machine, whether or not it builds.

An installed package carries the folder as ``flash_attn_ext._build_tools`` (see setup.py). In a
source tree and in an editable install it lies beside the package.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from build_tools import archs, jobs, switches, toolchain

__all__ = ["archs", "jobs", "switches", "toolchain"]


def _load(name: str) -> ModuleType:
    qualified = f"flash_attn_ext._build_tools.{name}"
    try:
        return importlib.import_module(qualified)
    except ModuleNotFoundError:
        path = Path(__file__).resolve().parents[2] / "build_tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(qualified, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module


if not TYPE_CHECKING:
    archs, jobs, switches, toolchain = map(_load, __all__)
