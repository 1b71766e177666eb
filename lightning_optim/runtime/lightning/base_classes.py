"""Hold base classes for callbacks, exceptions and mixins that belong to both of Lightning's packages.

``trainer.early_stopping_callback`` of a package, its command line, and other people's code ask whether an object is an
instance of that package's class. So :class:`CallbackBase` derives from the ``Callback`` of each package that is
imported: when another package is imported, that class joins the ``__bases__`` of ours, and counts for subclasses and
for objects that exist already. One class for both keeps pickles, checkpoints and documentation the same in both.

The alternatives are worse. A subclass for each package doubles each public name and each key of a checkpoint. A virtual
base class is not possible, because the metaclass of Lightning's ``Callback`` is ``type``. An object with a false
``__class__`` cannot be pickled. To wait for the next ``setup`` is too late for a command line, whose parser asks first.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_optim.runtime.lightning.packages import PACKAGES, found

if TYPE_CHECKING:
    from lightning.pytorch import Callback as CallbackBase
    from lightning.pytorch import LightningModule as ModuleMixin
    from lightning.pytorch.callbacks.early_stopping import EarlyStopping as EarlyStoppingBase
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
else:

    class _Extensible:
        """First base of a class that others join: Python does not let the base ``object`` be replaced."""

    class CallbackBase(_Extensible):
        """Base of callbacks: a ``Callback`` of each package that is imported. Its constructor calls none of theirs."""

    class EarlyStoppingBase(_Extensible):
        """Second base of this package's ``EarlyStopping``: an ``EarlyStopping`` of each package that is imported."""

    class _ExtensibleError(Exception):
        """First base of an exception that others join."""

    class MisconfigurationException(_ExtensibleError):
        """Exception for settings that cannot work: a ``MisconfigurationException`` of each package."""

    class ModuleMixin:
        """Base of mixins for a ``LightningModule`` of either package; for type checkers it is that class.

        Raises:
            TypeError: If a class lists a mixin after its LightningModule, whose methods would hide those of the mixin.
        """

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            join_packages()  # a mixin raises our `MisconfigurationException` also where no callback is in the fit
            theirs = found("LightningModule")
            own = [index for index, base in enumerate(cls.__mro__) if base in theirs]
            for late in cls.__mro__[own[0] :] if own else ():
                if issubclass(late, ModuleMixin) and late is not ModuleMixin:
                    raise TypeError(
                        f"{cls.__name__} lists {late.__name__} after its LightningModule, whose methods hide those of"
                        f" the mixin: write `class {cls.__name__}({late.__name__}, …)`, with the mixin first."
                    )


_THEIRS = {
    CallbackBase: ("Callback", ""),
    EarlyStoppingBase: ("EarlyStopping", "callbacks"),
    MisconfigurationException: ("MisconfigurationException", "utilities.exceptions"),
}


def join_packages() -> None:
    """Let the classes of each imported package join the bases of ours. Calling it again is a no-op."""
    for ours, (name, place) in _THEIRS.items():
        bases = (ours.__bases__[0], *found(name, place))
        if ours.__bases__ != bases:
            ours.__bases__ = bases


class _Finder(importlib.abc.MetaPathFinder):
    """Call :func:`join_packages` right after one of the packages is imported, whoever imports it."""

    def __init__(self) -> None:
        self._asking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in PACKAGES or fullname in self._asking:  # asked by another finder that asks all others too
            return None
        self._asking.add(fullname)
        try:
            finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
            specs = (finder.find_spec(fullname, path, target) for finder in finders)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._asking.discard(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            with contextlib.suppress(AttributeError):  # a loader that takes no attributes: `setup` joins them later
                loader.exec_module = _then_join(loader.exec_module)
        return spec


def _then_join(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def execute_and_join(module: ModuleType) -> None:
        execute(module)
        join_packages()

    return execute_and_join


sys.meta_path.insert(0, _Finder())
join_packages()
