"""Check the functions that make the members of an ensemble and their Trainers, and what these functions return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from torch import Tensor, nn

from lightning_optim.base.shards import version
from lightning_optim.runtime.lightning import LightningModule, Trainer
from lightning_optim.runtime.lightning.torch_internals import WeakTensorKeyDictionary


def check_function(name: str, function: Any, kind: str) -> None:
    """Check that an argument is a function of the index, and neither the class nor the object that it should return.

    Args:
        name: The argument's name, for the message.
        function: The argument.
        kind: What the function returns, for the message.

    Raises:
        ValueError: If it is no function, or cannot be called with one index; with the line to write.
    """
    made = isinstance(function, nn.Module | Trainer)
    is_class = inspect.isclass(function)
    if made or is_class or not callable(function):
        what = function.__name__ if is_class else type(function).__name__
        got = f"the class {what}, whose first argument is not the index" if is_class else f"a {what}"
        line = f"`{name}=lambda index: {what}(…)`" if made or is_class else f"`{name}=lambda index: …`"
        raise ValueError(f"`{name}` must be a function from the index to a new {kind}, got {got}: write {line}")
    try:
        inspect.signature(function).bind(0)
    except TypeError as error:
        raise ValueError(
            f"`{name}` must be a function from the index to a new {kind}, and is called with the index alone, which its"
            f" signature does not allow ({error}): write `{name}=lambda index: …`"
        ) from error
    except ValueError:  # a function in C that does not tell its signature
        return


class MemberMaker:
    """Make each member and its Trainer, and check that both are new.

    A member is not new if it is an earlier one again, or has weights that an earlier fit has changed and nothing
    has written since. The members themselves are not kept alive.

    Args:
        make_member: Function from the index to a new LightningModule.
        make_trainer: Function from the index to a new Trainer.

    Raises:
        ValueError: If one of them is not such a function; in a call, if what it returns is not new.
    """

    # Of all calls in this process: the next call after one that failed would begin with the module of the failed one.
    _members: ClassVar[WeakValueDictionary[int, nn.Module]] = WeakValueDictionary()
    # The version of each weight at the end of the last fit that changed it.
    _trained: ClassVar[MutableMapping[Tensor, int]] = WeakTensorKeyDictionary()

    def __init__(self, make_member: Callable[[int], LightningModule], make_trainer: Callable[[int], Trainer]) -> None:
        check_function("make_member", make_member, "LightningModule")
        check_function("make_trainer", make_trainer, "Trainer")
        self.make_member, self.make_trainer = make_member, make_trainer

    def __call__(self, index: int) -> tuple[LightningModule, Trainer]:
        """Return the member of this index and its Trainer."""
        member, trainer = self.make_member(index), self.make_trainer(index)
        if not isinstance(member, LightningModule):
            raise ValueError(f"`make_member` must return a LightningModule, got a {type(member).__name__}")
        if not isinstance(trainer, Trainer) or trainer.state.fn is not None:
            got = "one that was used already" if isinstance(trainer, Trainer) else f"a {type(trainer).__name__}"
            raise ValueError(f"`make_trainer` must return a new Trainer for each member, got {got}")
        self._check_new(member)
        return member, trainer

    @contextmanager
    def training(self, member: LightningModule) -> Iterator[None]:
        """Context manager: remember which weights the fit in it has changed, also if it fails."""
        before = [(parameter, version(parameter)) for parameter in member.parameters()]
        try:
            yield
        finally:
            for parameter, first in before:
                if (last := version(parameter)) != first:
                    self._trained[parameter] = last

    def _check_new(self, member: LightningModule) -> None:
        kind = type(member).__name__
        if id(member) in self._members:
            raise ValueError(
                f"`make_member` must return a new module for each member, got the same {kind} again, with the weights"
                f" of an earlier member: make it inside the function, `lambda index: {kind}(…)`"
            )
        self._members[id(member)] = member
        for name, parameter in member.named_parameters():
            if parameter.requires_grad and self._trained.get(parameter) == version(parameter):
                raise ValueError(
                    f"`make_member` must return a new module for each member, and the parameter {name!r} of this"
                    f" {kind} has been trained in an earlier member: make its submodules inside the function too,"
                    " or load their first weights there. Members may share what no fit changes: freeze it with"
                    " `requires_grad_(False)`"
                )
