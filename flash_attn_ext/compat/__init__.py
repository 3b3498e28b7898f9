"""Unmodified flash-attn code on these kernels: modules named ``flash_attn``, only on request.

``fa2/`` holds ``flash_attn`` (2.8.3, with the ``flash_attn_2_cuda`` behind it) and ``fa3/``
``flash_attn_interface``, each beside the metadata that other libraries look for
(``importlib.metadata.version("flash-attn")``). Both are ordinary folders for ``sys.path``. They get
there

* for one command: ``python -m flash_attn_ext run script.py``;
* for one process: ``enable()``, before anything imports flash_attn;
* for one environment: ``python -m flash_attn_ext compat install``, which writes one line into
  site-packages, and ``compat remove``, which takes it away.

What real code imports is there; a module of flash-attn that is not (``flash_attn.models``,
``flash_attn.ops.fused_dense``) fails to import as if flash-attn had been built without it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

VERSION = "2.8.3"
"""Of the flash-attn that ``fa2`` stands for. Without a local part: others compare with it."""

FOLDER = Path(__file__).resolve().parent
INSTALLED_NAME = "flash_attn_ext_compat.pth"
_NAMES = {
    "fa2": ("flash_attn", "flash_attn_2_cuda"),
    "fa3": ("flash_attn_interface", "flash_attn_3"),
}


def folders(fa3: bool = False) -> list[Path]:
    """The folders that stand for flash-attn 2 and, with ``fa3``, flash-attn 3."""
    return [FOLDER / "fa2", *([FOLDER / "fa3"] if fa3 else [])]


def enable(fa3: bool = False, force: bool = False) -> None:
    """Makes ``import flash_attn`` give these kernels, in this process.

    Says so in one line on stderr. Modules that looked for flash-attn earlier (transformers does
    when it is imported) keep what they found.

    Args:
        fa3: ``import flash_attn_interface`` too.
        force: also where a real flash-attn is installed, which is shadowed then.

    Raises:
        ImportError: a real flash-attn is installed, and not ``force``; or it was imported already.
    """
    check(fa3, force)
    new = [str(folder) for folder in folders(fa3) if str(folder) not in sys.path]
    if not new:
        return
    sys.path[:0] = new
    names = " and ".join(_NAMES[Path(folder).name][0] for folder in new)
    print(f"flash_attn_ext: import {names} gives flash_attn_ext in this process", file=sys.stderr)


def disable() -> None:
    """Undoes `enable`, also for modules that were imported through it."""
    for folder in folders(fa3=True):
        while str(folder) in sys.path:
            sys.path.remove(str(folder))
    for name in [name for name in sys.modules if _top(name) and _is_ours(sys.modules[name])]:
        del sys.modules[name]


def is_enabled(fa3: bool = False) -> bool:
    """Whether ``import flash_attn`` (with ``fa3``: ``flash_attn_interface``) would give ours."""
    folder = "fa3" if fa3 else "fa2"
    spec = PathFinder.find_spec(_NAMES[folder][0])
    return spec is not None and spec.origin is not None and _is_inside(spec.origin)


def check(fa3: bool = False, force: bool = False) -> None:
    """Raises ImportError where `enable` would refuse."""
    for name in (name for folder in folders(fa3) for name in _NAMES[folder.name]):
        loaded = sys.modules.get(name)
        if loaded is not None and not _is_ours(loaded):
            raise ImportError(
                f"compat: got a process that has imported {name} from "
                f"{getattr(loaded, '__file__', None)}, expected none yet; enable before that import"
            )
        real = real_module(name)
        if real is not None and not force:
            raise ImportError(
                f"compat: got a real {name} in {real}, expected none, which would be shadowed; "
                "uninstall it (pip uninstall flash-attn), or pass force=True (--force)"
            )


def real_module(name: str) -> Path | None:
    """Where a module of this name lies that is not ours; None if there is none.

    A folder without ``__init__.py``, such as the parent of a clone, is none.
    """
    paths = [path for path in sys.path if not _is_inside(path or os.getcwd())]
    spec = PathFinder.find_spec(name, paths)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def installed_file() -> Path:
    """The file of ``compat install``: one line with the folder, which Python adds to its path."""
    return Path(sysconfig.get_paths()["purelib"]) / INSTALLED_NAME


def install(fa3: bool = False, force: bool = False) -> Path:
    """Makes ``import flash_attn`` give these kernels in every process of this environment.

    Writes one file; nothing of flash_attn_ext is copied. The folder goes to the end of
    ``sys.path``, so that a real flash-attn that is installed later wins.

    Args:
        fa3: ``import flash_attn_interface`` too.
        force: also where a real flash-attn is installed; it still wins.

    Returns:
        The file.

    Raises:
        ImportError: a real flash-attn is installed, and not ``force``.
        OSError: site-packages cannot be written.
    """
    check(fa3, force)
    file = installed_file()
    file.write_text("".join(f"{folder}\n" for folder in folders(fa3)))
    return file


def remove() -> bool:
    """Undoes `install`; False if there was nothing to undo."""
    file = installed_file()
    existed = file.exists()
    file.unlink(missing_ok=True)
    return existed


def _top(name: str) -> bool:
    return any(name.partition(".")[0] in names for names in _NAMES.values())


def _is_inside(path: str) -> bool:
    return FOLDER in Path(path).resolve().parents or Path(path).resolve() == FOLDER


def _is_ours(module: object) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and _is_inside(file)
