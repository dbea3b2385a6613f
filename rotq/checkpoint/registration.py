"""Make transformers know the rotq format as soon as both packages are imported, in any order.

transformers has no entry point for quantizers; it would load a rotq checkpoint with random
weights. Importing it here would cost seconds, so the registration waits for it: a finder at the
front of ``sys.meta_path`` lets the usual finders look for transformers' quantizer mapping and
registers once that module has been executed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MAPPING_MODULE = "transformers.quantizers.auto"
QUANTIZER_MODULE = "rotq.checkpoint.quantizer"


def register_with_transformers() -> None:
    """Register now if transformers' mapping is loaded, else when it gets loaded."""
    if MAPPING_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MAPPING_MODULE:
            return None
        # its work is done with this import, and without it the usual finders are asked
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, wrapped: Loader) -> None:
        self.wrapped = wrapped

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.wrapped.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.wrapped
        _register()


def _register() -> None:
    # the quantizer's own import may be what loads the mapping; it registers itself at its end
    if QUANTIZER_MODULE not in sys.modules:
        importlib.import_module(QUANTIZER_MODULE)
