"""Make transformers know the rotq format, and PEFT packed layers, once they are imported.

Neither has an entry point for what others add: transformers would load a rotq checkpoint with
random weights, PEFT refuse its layers. Importing them here would cost seconds, so the registration
waits for them: a finder at the front of ``sys.meta_path`` lets the usual finders look for the
awaited modules, and has ours imported once those have been executed. Ours register at their end.

``pyproject.toml`` names ``register`` among torch's backends. torch calls those
when it is imported, which is how a program that never heard of rotq, as ``lm_eval``, loads the
format wherever rotq is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from rotq.errors import reason

AWAITED = {
    "transformers.quantizers.auto": "rotq.checkpoint.quantizer",
    "peft": "rotq.lora",
}
"""A module of another package to the one of ours that is imported behind it."""


def register() -> None:
    """Register with what is loaded, and with the rest as soon as it is; again is harmless."""
    for awaited, ours in AWAITED.items():
        if _is_loaded(awaited):
            _register(awaited, ours)
        elif not any(isinstance(f, _Finder) and f.awaited == awaited for f in sys.meta_path):
            sys.meta_path.insert(0, _Finder(awaited, ours))


class _Finder(MetaPathFinder):
    def __init__(self, awaited: str, ours: str) -> None:
        self.awaited, self.ours = awaited, ours
        self.is_asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.is_asking:
            return None
        if _is_loaded(self.awaited):
            # it was half executed when torch, imported by it, called us
            self.settle()
            return importlib.util.find_spec(fullname)
        return self._wrapped(fullname) if fullname == self.awaited else None

    def _wrapped(self, fullname: str) -> ModuleSpec | None:
        """What the other finders find; who asks may only want to know whether it is there."""
        self.is_asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.is_asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def settle(self) -> None:
        """The awaited module is there: register, and wait no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        _register(self.awaited, self.ours)


class _Loader(Loader):
    def __init__(self, wrapped: Loader, finder: _Finder) -> None:
        self.wrapped, self.finder = wrapped, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.wrapped.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.wrapped
        self.finder.settle()


def _is_loaded(name: str) -> bool:
    """Whether a module has been executed to its end."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


def _register(awaited: str, ours: str) -> None:
    # our module's own import may be what loads the awaited one; it registers itself at its end
    if ours in sys.modules:
        return
    try:
        importlib.import_module(ours)
    except Exception as error:
        # who only has rotq installed must not lose transformers or PEFT by it
        message = f"rotq cannot register with {awaited}: {reason(error)}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
