"""Find classes and functions in Lightning's two packages, ``lightning.pytorch`` and ``pytorch_lightning``.

The two have the same names and share no class. A module of one works in a Trainer of that one alone, while a callback
of this package works in both, in one process. So no package is imported here: a name is looked up in those that the
user has imported, at the moment when it is used.

* :func:`stand_in` makes a class for ``isinstance`` and annotations, in the place of one class in each package;
* :func:`of_same_package` finds a class or a function in the package that a module or a Trainer comes from.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from types import ModuleType
from typing import Any

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def imported_packages() -> tuple[str, ...]:
    """Return the names of the packages that are imported, completely. A mock in the place of one is none."""
    return tuple(name for name in PACKAGES if isinstance(getattr(sys.modules.get(name), "Trainer", None), type))


def imported_versions() -> str:
    """Return the imported packages with their versions, for messages."""
    versions = [(name.partition(".")[0], sys.modules[name].__version__) for name in imported_packages()]
    return " and ".join(f"{name} {version}" for name, version in versions)


def is_of_lightning(kind: type) -> bool:
    """Return True if a class itself, and not only a base of it, is defined in one of the packages."""
    return any(f"{kind.__module__}.".startswith(f"{package}.") for package in PACKAGES)


def package_of(thing: Any) -> str:
    """Return the name of the package that an object or a class comes from, by its base classes.

    Raises:
        TypeError: If it comes from neither.
    """
    kind = thing if isinstance(thing, type) else type(thing)
    for cls in filter(is_of_lightning, kind.__mro__):
        return next(package for package in PACKAGES if f"{cls.__module__}.".startswith(f"{package}."))
    raise TypeError(f"{kind.__name__} has no base class in {' or '.join(PACKAGES)}")


def version_of(thing: Any) -> tuple[int, ...]:
    """Return the version of the package that an object or a class comes from, such as ``(2, 6, 1)``."""
    version = sys.modules[package_of(thing)].__version__
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def of_same_package(thing: Any, name: str, place: str = "") -> Any:
    """Return a class or a function of the package that ``thing`` comes from.

    Args:
        thing: An object or a class, such as a module or a Trainer.
        name: Name of the class or function.
        place: Path of its module within the package. Default: the package itself.
    """
    return getattr(_module(package_of(thing), place), name)


def found(name: str, place: str = "") -> tuple[Any, ...]:
    """Return what has a name in each imported package; an earlier version may lack it."""
    return _found(tuple(sys.modules[package] for package in imported_packages()), name, place)


@functools.cache
def _found(packages: tuple[ModuleType, ...], name: str, place: str) -> tuple[Any, ...]:
    """Take the packages themselves, since one that is imported anew, as in some tests, has other classes."""
    modules = [_module(package.__name__, place) for package in packages]
    return tuple(getattr(module, name) for module in modules if hasattr(module, name))


def _module(package: str, place: str) -> Any:
    try:
        return importlib.import_module(f"{package}.{place}" if place else package)
    except ModuleNotFoundError:  # an earlier version
        return None


# ---- classes that stand for those of both packages -------------------------------------------------------------------


class StandIn(type):
    """Metaclass of a class that stands for the class of the same name in each package that is imported.

    ``isinstance(trainer, Trainer)`` with such a class is true for the Trainer of either package, and false as long as
    no package is imported. It has no objects, and is no base class.
    """

    place: str

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        if bases:
            raise TypeError(f"{name} would derive from a class that only stands for those of Lightning's packages")
        return super().__new__(mcs, name, bases, namespace)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, classes_of(cls))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, classes_of(cls))


def stand_in(name: str, place: str = "") -> Any:
    """Make a class that stands for the class of this name in each package; see :class:`StandIn`."""
    home = __name__.rpartition(".")[0]  # parsers of command lines import the module of a class, and look for it there
    return StandIn(name, (), {"place": place, "__module__": home})


def classes_of(kind: StandIn) -> tuple[type, ...]:
    """Return the classes that a :class:`StandIn` stands for now: one for each package that is imported."""
    return found(kind.__name__, kind.place)


def overrides(kind: type, name: str, base: Any) -> bool:
    """Return True if a class has a method of this name beside those of ``base``, a :class:`StandIn`."""
    theirs = {cls for each in classes_of(base) for cls in each.__mro__}
    return any(name in vars(cls) for cls in kind.__mro__ if cls not in theirs)
