"""Registers the format of exports with transformers, and checks with PEFT, once these are imported.

``import lowrank_pl`` must make ``from_pretrained`` load exports, whatever is imported first. The format's code needs
torch and most of transformers, which take seconds to import. Hence the format is registered at once only where
transformers' table of formats is already imported, and otherwise right after that import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_format"]

TABLE = "transformers.quantizers.auto"
"""The module with the tables that the format is entered in."""


ADAPTERS = "peft.tuners.tuners_utils"
"""The module of PEFT that all its adapters come from."""


# Every model's code imports the second one after the table. It is watched too for the case that one thread already
# looks for the table while another thread imports this package.
WATCHED = (TABLE, "transformers.modeling_utils", ADAPTERS)


def register_format() -> None:
    """Teach transformers the format, now or as soon as its table of formats is imported.

    Calls after the first one change nothing.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _register()


def _register() -> None:
    if TABLE in sys.modules:
        # The module registers the format as it is imported. In the middle of its own import it gets here too, and the
        # line below does nothing then.
        import_module("lowrank_pl.models.hf_format")
    # In the middle of its own import, the module does not have its classes yet.
    if hasattr(sys.modules.get(ADAPTERS), "BaseTunerLayer"):
        import_module("lowrank_pl.models.peft_checks")


class _Finder(MetaPathFinder):
    """Finds the watched modules where they would have been found anyhow, and hears when they have been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Loads a module with ``inner``, then registers the format. Afterwards the module shows ``inner`` as its loader."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        # What inspect and pkgutil ask a loader for, before the module is imported.
        return getattr(self._inner, name)


_FINDER = _Finder()
