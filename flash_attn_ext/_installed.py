"""Makes ``import flash_attn_ext`` give the installed build, also inside the repository.

The repository's root holds a folder with the package's name. A program that is started there
(``python -m flash_attn_ext``, ``python -c``, a notebook) finds that folder before the installed
package, and the folder has no compiled libraries. So the package's ``__init__`` first asks here::

    from flash_attn_ext import _installed

    if not _installed.redirect(__name__):
        ...  # the public names

A folder is left as it is if it was built in place (``pip install -e .``, ``setup.py build_ext
--inplace``), if nothing is installed, or if FLASH_ATTN_EXT_SOURCE_TREE=1 asks for the sources.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

BUILD_INFO = "_build_info.json"  # written by every build; a bare source folder has none
SOURCE_TREE_VARIABLE = "FLASH_ATTN_EXT_SOURCE_TREE"
REDIRECTED_FROM = "__redirected_from__"  # attribute of the package: the source folder passed over


def _is_built(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, BUILD_INFO))


def find_installed(name: str, source_folder: str) -> ModuleSpec | None:
    """Returns the spec of an installed, built package of this name outside of ``source_folder``.

    Args:
        name: the package.
        source_folder: the package folder that Python found first.
    """
    source = os.path.realpath(source_folder)
    for finder in sys.meta_path:
        # PathFinder stops at the first folder of the name, which is the one to be passed over; so
        # it is asked for each entry of sys.path. Others are the finders of editable installs.
        searches: list[list[str] | None] = [None]
        if finder is PathFinder:
            searches = [[entry or os.getcwd()] for entry in sys.path]
        for search in searches:
            spec = finder.find_spec(name, search)
            if spec is None or not spec.origin or not spec.submodule_search_locations:
                continue
            folder = os.path.dirname(os.path.realpath(spec.origin))
            if folder != source and _is_built(folder):
                return spec
    return None


def redirect(name: str) -> bool:
    """Turns the package that is being imported into the installed one, if it is a bare source.

    Args:
        name: ``__name__`` of the package.

    Returns:
        True if the installed package has taken over and nothing more is to be done.
    """
    source_folder = os.path.dirname(os.path.abspath(__file__))
    if _is_built(source_folder) or os.environ.get(SOURCE_TREE_VARIABLE, "0") not in ("", "0"):
        return False
    spec = find_installed(name, source_folder)
    if spec is None or spec.loader is None:
        return False
    package = sys.modules[name]
    # What came from the source folder so far, this module, is imported anew from the installed one.
    for module in [key for key in sys.modules if key.startswith(f"{name}.")]:
        del sys.modules[module]
        vars(package).pop(module.removeprefix(f"{name}."), None)
    package.__spec__ = spec
    package.__loader__ = spec.loader
    package.__file__ = spec.origin
    package.__path__ = list(spec.submodule_search_locations or [])
    setattr(package, REDIRECTED_FROM, source_folder)
    spec.loader.exec_module(package)
    return True
