"""Makes setup.py's helpers importable without putting the repository root on the module path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def _register(name: str, path: Path) -> None:
    if name in sys.modules:
        return
    folders = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_register("build_tools", REPOSITORY / "build_tools" / "__init__.py")
_register("pick", REPOSITORY / "wheels" / "pick.py")
_register("make_index", REPOSITORY / "wheels" / "make_index.py")
_register("flash_attn_ext_setup", REPOSITORY / "setup.py")
_register("wheel_samples", Path(__file__).with_name("wheel_samples.py"))
