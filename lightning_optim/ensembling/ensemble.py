"""Several models as one LightningModule, for evaluation."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torchmetrics import Metric

from lightning_optim.ensembling.combine import Outputs
from lightning_optim.ensembling.inner import (
    Mean,
    check_arguments,
    checked_members,
    has_submodule,
    no_submodule,
    replaced,
)

_TORCH = frozenset(vars(nn.Module()))  # where torch keeps submodules, parameters and hooks: an ensemble has its own
_STEPS = ("validation_step", "test_step", "predict_step")
_classes: dict[tuple[type, type], type[Ensemble]] = {}


class Ensemble(LightningModule):
    r"""Several models as one, for ``trainer.validate``, ``test``, ``predict``, and for plain calls.

    The steps, hooks, metrics and loaders are those of the first member, run as they are; but the one call that turns
    inputs into outputs goes to every member and returns the mean prediction. So the user's loss, torchmetrics and
    ``self.log`` give the mean's values, also with several processes. Of classifiers that return logits the result is

    .. math:: \log \tfrac{1}{M} \textstyle\sum_i \mathrm{softmax}(z_i),

    the log of the mean probability, so that cross entropy on it is the log loss of the mean. On every batch it is at
    most the mean of the members' log losses (Jensen). Of accuracy no such thing is true.

    What the call returns must be said, and is never guessed. Under ``"values"``, the default, the outputs themselves
    are averaged: right for regression; for logits it gives the geometric mean of the probabilities, renormalized.

    The members are copied: those given, their weights and modes, stay as they are, and may train on
    (:meth:`from_checkpoints` makes no second copy). The copies are in eval mode, always, and without gradients.
    Devices, precision, DDP and FSDP2 (if the members override ``configure_model``) are the Trainer's business, as with
    any module. Each process holds all members, and runs them one after the other.

    An ensemble is also an instance of the first member's class, and pickles, saves and loads as a module does; its
    ``state_dict`` has ``members.0.…``, ``members.1.…``. See `Deep Ensembles <https://arxiv.org/abs/1612.01474>`_.

    Args:
        members: LightningModules that take the same inputs, and leave them unchanged. They may differ in architecture.
            A submodule that several of them share is shared by the copies.
        outputs: What the combined call returns: ``"values"`` (nested as it may be), ``"probabilities"``, ``"logits"``
            of classes that exclude each other, ``"binary_logits"``, each a decision of its own. Half precision is
            combined, and returned, in fp32.
        on: The submodule whose call is combined, such as ``"net"`` where the steps call ``self.net(x)``; each member's
            own submodule of this name is called. ``None``: the members' ``forward``, for steps that call ``self(x)``.
        dim: The dimension of the classes in logits. ``None``: the last of at most two; with more it must be said.

    Raises:
        ValueError: If an argument is not allowed.
        MisconfigurationException: If a step never reached the combined call, since its values would be those of one
            member; and in ``trainer.fit``.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> models = [BoringModel(), BoringModel()]
        >>> ensemble = Ensemble(models)
        >>> x = torch.ones(1, 32)
        >>> torch.allclose(ensemble(x), (models[0](x) + models[1](x)) / 2)
        True
    """

    _mean: Mean
    _watched: set[str]
    _replaced: dict[str, nn.Module]

    def __init__(
        self,
        members: Sequence[LightningModule],
        *,
        outputs: Outputs = "values",
        on: str | None = None,
        dim: int | None = None,
    ) -> None:
        self._assemble(copy.deepcopy(checked_members(members)), outputs, on, dim)

    @classmethod
    def from_checkpoints(
        cls,
        member_class: type[LightningModule],
        paths: Iterable[str | Path],
        *,
        outputs: Outputs = "values",
        on: str | None = None,
        dim: int | None = None,
        **kwargs: Any,
    ) -> Ensemble:
        """The ensemble of the models in these files, as Lightning or :func:`~lightning_optim.fit_members` wrote them.

        Args:
            member_class: The members' class.
            paths: One file for each member.
            outputs: As for the class.
            on: As for the class.
            dim: As for the class.
            kwargs: For ``member_class.load_from_checkpoint``: arguments of the class that are not in the file, or
                ``map_location``. ``weights_only=True`` unless it says otherwise: a file may come from a stranger.
        """
        files = [paths] if isinstance(paths, str | Path) else list(paths)
        members = [_load(member_class, path, kwargs) for path in files]
        ensemble = cls.__new__(cls)
        ensemble._assemble(checked_members(members), outputs, on, dim)
        return ensemble

    def _assemble(self, members: list[LightningModule], outputs: Outputs, on: str | None, dim: int | None) -> None:
        check_arguments(outputs, on, dim)
        super().__init__()
        first = members[0]
        # What the steps find on `self`. Modules and tensors are looked up in the first member, where they have a name.
        for name, value in vars(first).items():
            if name not in _TORCH:
                bound = isinstance(value, types.MethodType) and value.__self__ is first
                self.__dict__[name] = types.MethodType(value.__func__, self) if bound else value
        self.__dict__["_trainer"] = None  # that of a member that was trained
        self.members = nn.ModuleList(members)
        self.__dict__.update(_mean=Mean(self.members, outputs, on, dim), _watched=set())
        self._link()
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()
        self.requires_grad_(False)
        self.__class__ = _class_of(type(self), type(first))
        self.eval()

    def _link(self) -> None:
        """Put the mean where the steps look for ``on``."""
        on, first = self._mean.on, self.members[0]
        self.__dict__["_replaced"] = {}
        for name in (*first._modules, *first._parameters, *first._buffers):
            self.__dict__.pop(name, None)  # `net = None` until `configure_model` made it
        if on is None:
            return
        for index, member in enumerate(self.members):
            if not has_submodule(member, on):
                if is_overridden("configure_model", member):
                    return  # it may be made there
                raise no_submodule(member, index, on)
        self.__dict__["_replaced"] = replaced(first, on, self._mean)

    # ---- what is combined --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The mean prediction; with ``on``, the first member's ``forward`` with the mean in it."""
        if self._mean.on is None:
            return self._mean(*args, **kwargs)
        with _reaching(self, "forward"):
            return super().forward(*args, **kwargs)

    @torch.no_grad()
    def member_outputs(self, *args: Any, **kwargs: Any) -> list[Any]:
        """What the call that is combined returns in each member, for measures of how far they are apart."""
        return list(self._mean.each(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if "_replaced" not in own or any(name in own[kind] for kind in ("_modules", "_parameters", "_buffers")):
            return super().__getattr__(name)
        if name in own["_replaced"]:
            return own["_replaced"][name]
        try:
            return getattr(own["_modules"]["members"][0], name)
        except AttributeError:
            return super().__getattr__(name)

    # ---- what an ensemble does not do --------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Ensemble:
        """Stay in eval mode: dropout and BatchNorm of the members do not train."""
        return super().train(False)

    def training_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to train."""
        raise MisconfigurationException(
            "An Ensemble is for `validate`, `test` and `predict`, and does not train: fit its members one by one, or"
            " with `fit_members`, and make the Ensemble of what they became."
        )

    def configure_optimizers(self) -> NoReturn:
        """Refuse to train."""
        self.training_step()

    # ---- life --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse to train; then the first member's ``setup``."""
        if stage == "fit":
            self.training_step()
        for member in self.members:
            member.trainer = self.trainer
        self._watched.clear()
        super().setup(stage)

    def configure_model(self) -> None:
        """Each member's ``configure_model``, which may shard it."""
        sharded = self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)
        member: Any
        for member in self.members:
            if is_overridden("configure_model", member):
                member._device_mesh = self._device_mesh
                member.configure_model()
            elif sharded:
                raise MisconfigurationException(
                    f"Under ModelParallelStrategy a model is sharded in `configure_model`, which"
                    f" {type(member).__name__} does not override: override it, or evaluate the ensemble with DDP."
                )
        self._link()
        self.requires_grad_(False)

    # ---- state -------------------------------------------------------------------------------------------------------

    # A member's class may rename what it saves: each member is asked in turn, and the ensemble itself renames nothing.
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The members' states, under ``members.0.…``, ``members.1.…``."""
        return nn.Module.state_dict(self, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over what :meth:`state_dict` returned."""
        return nn.Module.load_state_dict(self, state_dict, strict, assign)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle cannot find it by its name.
        ensemble, member = type(self).__bases__
        return _blank, (ensemble, member), self.__getstate__()


def _class_of(ensemble: type[Ensemble], member: type[LightningModule]) -> type[Ensemble]:
    """The class of an ensemble whose steps are those of ``member``: each of them must reach the combined call."""
    if (ensemble, member) not in _classes:
        steps = {name: getattr(member, name) for name in _STEPS}
        own = {n: _checked(s) for n, s in steps.items() if n == "predict_step" or s is not getattr(LightningModule, n)}
        body = {"__module__": ensemble.__module__, "__doc__": ensemble.__doc__, **own}
        name = f"{ensemble.__name__}[{member.__name__}]"
        _classes[ensemble, member] = types.new_class(name, (ensemble, member), exec_body=lambda ns: ns.update(body))
    return _classes[ensemble, member]


def _blank(ensemble: type[Ensemble], member: type[LightningModule]) -> Ensemble:
    made = _class_of(ensemble, member)
    return made.__new__(made)


def _checked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, which must reach the combined call; the first time it is seen what else of one member it uses."""

    @functools.wraps(step)
    def checked(self: Ensemble, *args: Any, **kwargs: Any) -> Any:
        where = step.__name__
        with _reaching(self, where):
            if where in self._watched:
                return step(self, *args, **kwargs)
            self._watched.add(where)
            with self._mean.watch() as strays:
                result = step(self, *args, **kwargs)
        if strays:
            rank_zero_warn(
                f"`{where}` also used layers of the first member outside of the combined call (`on={self._mean.on!r}`):"
                f" {sorted(strays)}. Their output is one member's. Set `on` to a submodule that holds them, or to None"
                " where the step calls `self(…)`."
            )
        return result

    return checked


@contextmanager
def _reaching(ensemble: Ensemble, where: str) -> Iterator[None]:
    """What runs in this context must reach the combined call; of contexts inside each other, the outermost."""
    mean = ensemble._mean
    before, inside = mean.calls, mean.inside
    mean.inside = True
    try:
        yield
    finally:
        mean.inside = inside
    if mean.calls == before and not inside:
        called = "self(…)" if mean.on is None else f"self.{mean.on}(…)"
        names = [name for name, _ in ensemble.members[0].named_children()]
        raise MisconfigurationException(
            f"`{where}` never reached `{called}`, which is what the Ensemble combines (`on={mean.on!r}`), so its values"
            f" are those of one member. Set `on` to the submodule that is called there, one of {names} or inside one,"
            ' such as "model.net"; or to None where it is `self(…)`.'
        )


def _load(member_class: type[LightningModule], path: str | Path, kwargs: dict[str, Any]) -> LightningModule:
    arguments: dict[str, Any] = {"weights_only": True, **kwargs}
    known = "weights_only" in inspect.signature(member_class.load_from_checkpoint).parameters
    if not known and arguments.pop("weights_only"):
        # Lightning before 2.6 unpickles whatever there is: let torch refuse first.
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return member_class.load_from_checkpoint(path, **arguments)
