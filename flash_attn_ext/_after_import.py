"""Something to do when somebody else imports a module, which is not imported for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


class AfterImport(MetaPathFinder):
    """Runs a function once a module has been imported; in ``sys.meta_path`` until then."""

    def __init__(self, module: str, function: Callable[[], None]) -> None:
        self.module, self.function = module, function
        self.searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """What the other finders find, with the function behind it."""
        if name != self.module or self.searching:
            return None
        self.searching = True
        try:
            spec = next(
                filter(None, (finder.find_spec(name, path, target) for finder in sys.meta_path)),
                None,
            )
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(imported: Any) -> None:
                execute(imported)
                if self in sys.meta_path:  # not before: a spec may be asked for and not imported
                    sys.meta_path.remove(self)
                self.function()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign,assignment]
        return spec


def after_import(module: str, function: Callable[[], None]) -> None:
    """Calls ``function`` now if ``module`` is imported already, else when it has been."""
    if module in sys.modules:
        function()
    elif not is_waited_for(module):
        sys.meta_path.insert(0, AfterImport(module, function))


def is_waited_for(module: str) -> bool:
    """Whether something is still to be done after the module's import."""
    return any(isinstance(x, AfterImport) and x.module == module for x in sys.meta_path)
