"""Remember how an object was constructed, to print it as it was written; name arguments that do not exist."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Mapping
from inspect import Parameter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_optim.base.suggestions import nearest

_MOST_ITEMS, _LONGEST = 20, 200  # of a container, and letters of the text of an object
_NOT_NAMED = (Parameter.POSITIONAL_ONLY, Parameter.VAR_POSITIONAL)


class _Argument(NamedTuple):
    """One argument as it was passed.

    Attributes:
        name: Name of the argument.
        named: True if it is shown with its name, in :func:`repr`.
        text: The value as a user would write it.
        plain: True for a number or a text, which the object may have changed since.
        place: Index of the argument in the signature; -1 if it takes a name only.
    """

    name: str
    named: bool
    text: str
    plain: bool
    place: int


class Constructed:
    """Print an object as the call that constructs an equal one, with the arguments that were passed.

    An argument without a default is shown without its name. An argument that equals its default is shown only if it is
    a number and other arguments were left to their defaults: a configuration file passes all of them. A number or text
    that the object keeps in an attribute of the argument's name is shown as it is now.

    Example::

        >>> class Scale(Constructed):
        ...     def __init__(self, factor, on=None, exclude=None):
        ...         self.factor = factor
        >>> Scale(0.5, "encoder.*")
        Scale(0.5, on='encoder.*')
        >>> Scale(0.5, exlude="head.*")
        Traceback (most recent call last):
            ...
        TypeError: Scale has no argument 'exlude'; did you mean 'exclude'? Its arguments are factor, on, exclude.
    """

    _written: tuple[tuple[Any, ...], ...] = ()  # of each `_Argument`, since a pickle names public classes only

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__name__, vars(cls)["__init__"])  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return self._call([argument.named for argument in self._arguments])

    @property
    def brief(self) -> str:
        """The same call as one writes it in short: the first argument has no name."""
        return self._call([argument.named and argument.place != 0 for argument in self._arguments])

    @property
    def _arguments(self) -> list[_Argument]:
        return [_Argument(*argument) for argument in self._written]

    def _call(self, named: list[bool]) -> str:
        shown = []
        for argument, with_name in zip(self._arguments, named, strict=True):
            now = getattr(self, argument.name, None) if argument.plain else None
            text = argument.text if now is None or not _is_plain(now) else written(now)
            shown.append(f"{argument.name}={text}" if with_name else text)
        return f"{type(self).__name__}({', '.join(shown)})"


def _remembering(name: str, init: Any) -> Any:
    """Wrap a constructor: check the names of the arguments, and remember what was passed, for ``__repr__``."""
    signature = inspect.signature(init)
    parameters = list(signature.parameters.values())[1:]
    known = [one.name for one in parameters if one.kind not in _NOT_NAMED]
    takes_any = any(one.kind is Parameter.VAR_KEYWORD for one in parameters)

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        if not takes_any and (unknown := [key for key in kwargs if key not in known]):
            raise TypeError(
                f"{name} has no argument {unknown[0]!r}{nearest(unknown[0], known) or '.'} Its arguments are"
                f" {', '.join(known)}."
            )
        if "_written" not in vars(self):  # a constructor of a base class is called within that of the object's class
            vars(self)["_written"] = tuple(map(tuple, _arguments(signature, (self, *args), kwargs)))
        init(self, *args, **kwargs)

    return construct


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[_Argument]:
    """Return the arguments of a call, in the order of the signature; none if one is missing."""
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return []
    parameters = list(signature.parameters.values())[1:]
    unnamed = any(one.kind is Parameter.VAR_POSITIONAL and bound.get(one.name) for one in parameters)
    optional = [one.name for one in parameters if one.default is not Parameter.empty]
    all_passed = len(optional) > 1 and all(name in bound for name in optional)
    found: list[_Argument] = []
    for place, parameter in enumerate(parameters):
        name, kind = parameter.name, parameter.kind
        if name not in bound:
            continue
        value = bound[name]
        if (all_passed or not _is_number(value)) and _is_default(value, parameter):
            continue
        if kind is Parameter.VAR_POSITIONAL:
            found += [_Argument("", False, written(one), False, place + more) for more, one in enumerate(value)]
        elif kind is Parameter.VAR_KEYWORD:
            found += [_Argument(key, True, written(one), _is_plain(one), -1) for key, one in value.items()]
        elif kind is Parameter.KEYWORD_ONLY:
            found.append(_Argument(name, True, written(value), _is_plain(value), -1))
        else:
            named = not (unnamed or parameter.default is Parameter.empty)
            found.append(_Argument(name, named, written(value), _is_plain(value), place))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_default(value: Any, parameter: Parameter) -> bool:
    return (_is_plain(value) or isinstance(value, torch.dtype)) and value == parameter.default


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None)


def written(value: Any) -> str:
    """Return the text of an argument as a user would write it: ``eval`` gives an equal one, if there is such a text.

    Long containers, tensors and long texts of other objects are cut, since this is called in each constructor.

    Example::

        >>> written({"lr": [float("inf"), torch.float32, nn.Linear, torch.device("cpu")]})
        "{'lr': [float('inf'), torch.float32, nn.Linear, 'cpu']}"
        >>> written([torch.zeros(1000)]), written(list(range(1000)))
        ('[<Tensor>]', '[…, 1000 items]')
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(float(value))!r})"
    if type(value) in (dict, list, tuple):
        return _written_container(value)
    if isinstance(value, os.PathLike | torch.device):
        return repr(str(value))
    if isinstance(value, type) and value in vars(nn).values():
        return f"nn.{value.__qualname__}"
    if isinstance(value, functools.partial):
        named = [f"{name}={written(one)}" for name, one in value.keywords.items()]
        return f"partial({', '.join([written(value.func), *map(written, value.args), *named])})"
    if isinstance(value, Constructed | bool | int | float | str | None):
        return repr(value)
    return getattr(value, "__qualname__", None) or _short(value)


def _written_container(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> str:
    begin, end = ("{", "}") if isinstance(value, dict) else ("[", "]") if isinstance(value, list) else ("(", ")")
    if len(value) > _MOST_ITEMS:
        return f"{begin}…, {len(value)} items{end}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{written(key)}: {written(one)}' for key, one in value.items())}}}"
    items = ", ".join(map(written, value))
    return f"{begin}{items}{',' if type(value) is tuple and len(value) == 1 else ''}{end}"


def _short(value: Any) -> str:
    """Return the text of an object, or its class if that is long, fails or would read a tensor."""
    name = f"<{type(value).__name__}>"
    if isinstance(value, Tensor | nn.Module):
        return name
    try:
        text = repr(value)
    except Exception:
        return name
    return text if len(text) <= _LONGEST and "\n" not in text else name
