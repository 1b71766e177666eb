"""Several models as one LightningModule, for evaluation."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from torchmetrics import Metric

from lightning_optim.base.module_registry import is_registered, registered_names, submodule_of
from lightning_optim.ensembling.combined_call import (
    CombinedCall,
    check_arguments,
    checked_members,
    gradient_free,
    has_submodule,
    no_submodule,
    replaced,
    undo_compilation_,
)
from lightning_optim.ensembling.ensemble_checkpoint import (
    Members,
    arguments_in,
    build_members,
    classes_in,
    load_member,
    load_members,
    load_weights,
    read,
    save_members,
)
from lightning_optim.ensembling.mean_prediction import Outputs
from lightning_optim.runtime.lightning import (
    LightningModule,
    MisconfigurationException,
    ModelParallelStrategy,
    _restricted_classmethod,
    is_overridden,
    rank_zero_warn,
)

_TORCH = frozenset(vars(nn.Module()))  # where torch keeps submodules, parameters and hooks: an ensemble has its own
_STEPS = ("validation_step", "test_step", "predict_step")
_classes: dict[tuple[type, type, tuple[str, ...]], type[Ensemble]] = {}


class Ensemble(LightningModule):
    r"""Several models as one, for ``trainer.validate``, ``test``, ``predict``, and for plain calls.

    The steps, hooks, metrics and loaders are those of the first member, run as they are; but the one call that turns
    inputs into outputs goes to every member and returns the mean prediction. So the user's loss, torchmetrics and
    ``self.log`` give the mean's values, also with several processes. Of classifiers that return logits the result is

    .. math:: \log \tfrac{1}{M} \textstyle\sum_i \mathrm{softmax}(z_i),

    the log of the mean probability, so that cross entropy on it is the log loss of the mean. On every batch it is at
    most the mean of the members' log losses (Jensen). Of accuracy no such thing is true.

    What the call returns must be said, and is never guessed. Under ``"values"`` the outputs themselves are averaged:
    right for regression; for logits it gives the geometric mean of the probabilities, renormalized.

    The members are copied: those given, their weights and modes, stay as they are, and may train on
    (:meth:`from_checkpoints` makes no second copy). The copies are in eval mode, always, and without gradients.
    Devices, precision, DDP and FSDP2 (if the members override ``configure_model``) are the Trainer's business, as with
    any module. Each process holds all members, and runs them one after the other.

    An ensemble is also an instance of the first member's class, and pickles, saves and loads as a module does; its
    ``state_dict`` has ``members.0.…``, ``members.1.…``. For serving without this package there are ``torch.export`` and
    ``to_torchscript(method="trace")``. See `Deep Ensembles <https://arxiv.org/abs/1612.01474>`_.

    Args:
        members: LightningModules that take the same inputs, and leave them unchanged. They may differ in architecture.
            A submodule that several of them share is shared by the copies.
        outputs: What the combined call returns: ``"values"`` (of a regression, nested as it may be), ``"logits"`` of
            classes that exclude each other, ``"binary_logits"``, each a decision of its own, or ``"probabilities"``.
            It has no default. Half precision is combined, and returned, in fp32.
        on: The submodule whose call is combined, such as ``"net"`` where the steps call ``self.net(x)``; each member's
            own submodule of this name is called. ``None``: the members' ``forward``, for steps that call ``self(x)``.
        dim: The dimension of the classes in logits. ``None``: the last of at most two; with more it must be said.

    Raises:
        ValueError: If an argument is not allowed.
        MisconfigurationException: If a step never reached the combined call, since its values would be those of one
            member; and in ``trainer.fit``.

    Example::

        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> models = [BoringModel(), BoringModel()]
        >>> ensemble = Ensemble(models, outputs="values")
        >>> x = torch.ones(1, 32)
        >>> torch.allclose(ensemble(x), (models[0](x) + models[1](x)) / 2)
        True
    """

    _made_of: tuple[Any, ...] = ()  # of a class made at run time: the arguments of `_class_of`
    _combined: CombinedCall
    _watched: set[str]
    _replaced: dict[str, nn.Module]

    def __init__(
        self,
        members: Sequence[LightningModule],
        *,
        outputs: Outputs | None = None,
        on: str | None = None,
        dim: int | None = None,
    ) -> None:
        given = checked_members(members)
        check_arguments(outputs, on, dim)
        self._assemble(copy.deepcopy(given), outputs, on, dim)

    @classmethod
    def from_checkpoints(
        cls,
        member_class: type[LightningModule],
        paths: Iterable[str | Path],
        *,
        outputs: Outputs | None = None,
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
        check_arguments(outputs, on, dim)
        files = [paths] if isinstance(paths, str | Path) else list(paths)
        if not files:
            raise ValueError("`paths` names at least one file, of one member each, got []")
        return cls._without_copies([load_member(member_class, path, kwargs) for path in files], outputs, on, dim)

    @_restricted_classmethod  # type: ignore[untyped-decorator]
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        members: Sequence[LightningModule] | None = None,
        member_class: type[LightningModule] | Sequence[type[LightningModule]] | None = None,
        outputs: Outputs | None = None,
        on: str | None = None,
        dim: int | None = None,
        **kwargs: Any,
    ) -> Ensemble:
        """Load the ensemble from a file that ``trainer.save_checkpoint`` wrote while it evaluated an ensemble.

        The file holds ``outputs``, ``on`` and ``dim``, and for each member the name of its class and what a checkpoint
        of the member would hold. Each member is made by its class's own ``load_from_checkpoint``.

        Args:
            checkpoint_path: The file.
            map_location: Where to, as for the members; the CPU if it is not said.
            hparams_file: For the members.
            strict: For the members.
            weights_only: ``False`` unpickles the file, and imports the members' classes by the names in it: only for
                files that you trust. Else nothing that the file names is called, and ``member_class`` or ``members``
                must be given.
            members: Modules of the members' architectures, in their order; they are copied, and the weights loaded.
            member_class: The members' class, or a list of one for each.
            outputs: In place of what is in the file; so are ``on`` and ``dim``.
            on: The same.
            dim: The same.
            kwargs: Arguments of the members' class that are not in the file, or in place of those that are.
        """
        trusted = weights_only is False
        checkpoint = read(checkpoint_path, weights_only=not trusted)
        given = {"outputs": outputs, "on": on, "dim": dim}
        arguments = arguments_in(checkpoint) | {name: value for name, value in given.items() if value is not None}
        if members is None:
            classes = classes_in(checkpoint_path, checkpoint, member_class, not trusted)
            loads = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict, **kwargs}
            made = build_members(checkpoint_path, checkpoint, classes, {"weights_only": not trusted, **loads})
            return cls._without_copies(made, **arguments)
        ensemble = cls(members, **arguments)
        ensemble.on_load_checkpoint(checkpoint)
        ensemble.load_state_dict(checkpoint["state_dict"], ensemble.strict_loading if strict is None else strict)
        return ensemble

    @classmethod
    def _without_copies(
        cls, members: list[LightningModule], outputs: Any = None, on: Any = None, dim: Any = None
    ) -> Ensemble:
        """Make an ensemble of these very members."""
        ensemble = cls.__new__(cls)
        checked = checked_members(members)
        check_arguments(outputs, on, dim)
        ensemble._assemble(checked, outputs, on, dim)
        return ensemble

    def _assemble(self, members: list[LightningModule], outputs: Any, on: str | None, dim: int | None) -> None:
        super().__init__()
        for member in members:
            undo_compilation_(member)
        first = members[0]
        # What the steps find on `self`. Modules and tensors are looked up in the first member, where they have a name;
        # so are steps that it has on the instance, since they must reach the combined call as those of a class.
        for name, value in vars(first).items():
            if name not in _TORCH and name not in _STEPS and name not in vars(Ensemble):
                bound = isinstance(value, types.MethodType) and value.__self__ is first
                self.__dict__[name] = types.MethodType(value.__func__, self) if bound else value
        self.__dict__["_trainer"] = None  # that of a member that was trained
        self.members = Members(members)
        self.__dict__.update(_combined=CombinedCall(self.members, outputs, on, dim), _watched=set())
        self._link()
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()
        self.requires_grad_(False)
        self.__class__ = _class_of(type(self), type(first), tuple(name for name in _STEPS if name in vars(first)))
        self.eval()

    def _link(self) -> None:
        """Put the mean where the steps look for ``on``."""
        on, first = self._combined.on, self.members[0]
        self.__dict__["_replaced"] = {}
        for name in registered_names(first):
            self.__dict__.pop(name, None)  # `net = None` until `configure_model` made it
        if on is None:
            return
        for index, member in enumerate(self.members):
            if not has_submodule(member, on):
                if is_overridden("configure_model", member):
                    return  # it may be made there
                raise no_submodule(member, index, on)
        self.__dict__["_replaced"] = replaced(first, on, self._combined)

    # ---- what is combined --------------------------------------------------------------------------------------------

    @gradient_free
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The mean prediction; with ``on``, the first member's ``forward`` with the mean in it."""
        if self._combined.on is None:
            return self._combined(*args, **kwargs)
        with _reaching(self, "forward"):
            own = _on_instance(self, "forward")
            return super().forward(*args, **kwargs) if own is None else own(*args, **kwargs)

    @gradient_free
    def member_outputs(self, *args: Any, **kwargs: Any) -> list[Any]:
        """What the call that is combined returns in each member, for measures of how far they are apart."""
        return list(self._combined.each(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if "_replaced" not in own or is_registered(self, name):
            return super().__getattr__(name)
        if name in own["_replaced"]:
            return own["_replaced"][name]
        try:
            return getattr(submodule_of(self, "members")[0], name)
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

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The members' states, under ``members.0.…``, ``members.1.…``."""
        return nn.Module.state_dict(self, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over what :meth:`state_dict` returned."""
        return load_weights(self.members, state_dict, strict, assign)

    @property
    def strict_loading(self) -> bool:
        """Whether any member loads strictly; each does so, or not, for itself."""
        return any(bool(member.strict_loading) for member in self.members)

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        member: Any
        for member in self.members:
            member.strict_loading = strict_loading

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Call each member's ``on_save_checkpoint``, and add what :meth:`load_from_checkpoint` needs."""
        about = {"outputs": self._combined.outputs, "on": self._combined.on, "dim": self._combined.dim}
        save_members(self.members, about, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Call each member's ``on_load_checkpoint``."""
        load_members(self.members, checkpoint)

    def __prepare_scriptable__(self) -> NoReturn:
        # What `torch.jit.script` asks first, and so does `to_torchscript()`.
        raise MisconfigurationException(
            'An Ensemble calls its members from Python, which TorchScript does not compile: use `method="trace"`'
            " with `example_inputs`, or `torch.export.export(ensemble, …)`."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle cannot find it by its name.
        return _blank, type(self)._made_of, self.__getstate__()


def _class_of(ensemble: type[Ensemble], member: type[LightningModule], steps: tuple[str, ...]) -> type[Ensemble]:
    """The class of an ensemble whose steps are those of ``member``: each of them must reach the combined call.

    Args:
        ensemble: The class that the user called.
        member: The first member's class.
        steps: The steps that the first member has on the instance.
    """
    key = (ensemble._made_of[0] if ensemble._made_of else ensemble, member, steps)
    if key not in _classes:
        _classes[key] = types.new_class(_name(*key), key[:2], exec_body=lambda body: body.update(_body(*key)))
    return _classes[key]


def _name(ensemble: type[Ensemble], member: type[LightningModule], _: Any) -> str:
    # TorchScript writes the name into its files, as source code.
    return re.sub(r"\W", "_", f"{ensemble.__name__}Of{member.__name__}")


def _body(ensemble: type[Ensemble], member: type[LightningModule], on_instance: tuple[str, ...]) -> dict[str, Any]:
    body: dict[str, Any] = {"__module__": ensemble.__module__, "__doc__": ensemble.__doc__}
    for name in _STEPS:
        step = getattr(member, name)
        if name == "predict_step" or name in on_instance or step is not getattr(LightningModule, name):
            body[name] = _checked(name, step)
        if name in on_instance:
            del body[name].__wrapped__  # where Lightning would see its own step, and take it for none
    if ensemble.forward is Ensemble.forward:
        body["forward"] = _forward_like(member)
    return {**body, "_made_of": (ensemble, member, on_instance)}


def _forward_like(member: type[LightningModule]) -> Callable[..., Any]:
    """``Ensemble.forward`` with the member's signature, by which ``torch.export`` names inputs and dynamic shapes."""

    @functools.wraps(Ensemble.forward)
    def forward(self: Ensemble, *args: Any, **kwargs: Any) -> Any:
        return Ensemble.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(member.forward)  # type: ignore[attr-defined]
    return forward


def _blank(ensemble: type[Ensemble], member: type[LightningModule], steps: tuple[str, ...]) -> Ensemble:
    made = _class_of(ensemble, member, steps)
    return made.__new__(made)


def _on_instance(ensemble: Ensemble, name: str) -> Callable[..., Any] | None:
    """Find a method that the first member has on the instance, not in its class; bind it to the ensemble."""
    first = ensemble.members[0]
    method: Any = vars(first).get(name)
    bound = isinstance(method, types.MethodType) and method.__self__ is first
    return types.MethodType(method.__func__, ensemble) if bound else method


def _checked(where: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, which must reach the combined call; the first time it is seen what else of one member it uses."""

    @functools.wraps(step)
    def checked(self: Ensemble, *args: Any, **kwargs: Any) -> Any:
        run = _on_instance(self, where) or types.MethodType(step, self)
        with _reaching(self, where):
            if where in self._watched:
                return run(*args, **kwargs)
            self._watched.add(where)
            with self._combined.watch() as strays:
                result = run(*args, **kwargs)
        if strays:
            rank_zero_warn(
                f"`{where}` also used layers of the first member outside of the combined call"
                f" (`on={self._combined.on!r}`): {sorted(strays)}. Their output is one member's. Set `on` to a"
                " submodule that holds them, or to None where the step calls `self(…)`."
            )
        return result

    return checked


@contextmanager
def _reaching(ensemble: Ensemble, where: str) -> Iterator[None]:
    """What runs in this context must reach the combined call; of contexts inside each other, the outermost."""
    mean = ensemble._combined
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
