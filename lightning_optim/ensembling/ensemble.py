"""Evaluate several models as one LightningModule."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from torchmetrics import Metric

from lightning_optim.base.module_registry import is_registered, registered_names, submodule_of
from lightning_optim.ensembling import ensemble_checkpoint
from lightning_optim.ensembling.combined_call import (
    CombinedCall,
    check_arguments,
    has_submodule,
    missing_submodule,
    with_replacement,
    without_gradients,
)
from lightning_optim.ensembling.ensemble_class import STEPS, ClassMethodOnly, ensemble_class, instance_method
from lightning_optim.ensembling.ensemble_members import Members, checked_members, uncompile_
from lightning_optim.ensembling.mean_prediction import Outputs
from lightning_optim.runtime.lightning import (
    LightningModule,
    MisconfigurationException,
    ModelParallelStrategy,
    ModuleMixin,
)
from lightning_optim.runtime.lightning.modules import (
    detach_trainer,
    is_attached,
    is_overridden,
    lightning_module_class,
    share_device_mesh,
)

_TORCH = frozenset(vars(nn.Module()))  # attributes in which torch keeps submodules, parameters and hooks


class Ensemble(ModuleMixin):
    r"""Combine several models into one module for ``trainer.validate``, ``test`` and ``predict``, and for plain calls.

    The ensemble runs the steps, hooks, metrics and loaders of its first member, unchanged. Only the one call that turns
    inputs into outputs goes to every member, and returns the mean prediction. So your loss, torchmetrics and
    ``self.log`` give the values of the mean, in one process or several. For classifiers that return logits the mean is

    .. math:: \log \tfrac{1}{M} \textstyle\sum_i \mathrm{softmax}(z_i),

    the log of the mean probability: cross entropy on it is the log loss of the mean. On every batch this is at most the
    mean of the members' log losses (Jensen's inequality). Accuracy has no such bound.

    You must say what the call returns: ``outputs`` has no default, because each kind is averaged in its own way.
    ``"values"`` averages the outputs themselves. That is right for regression; for logits it would give the
    renormalized geometric mean of the probabilities.

    The members are copied. Those that you give keep their weights and modes, and may be trained on;
    :meth:`from_checkpoints` makes no second copy. The copies are always in eval mode and have no gradients. Every
    process holds all members and runs them one after the other. The Trainer takes care of devices, precision, DDP and
    FSDP2 (if the members override ``configure_model``), as for any module.

    An ensemble is also an instance of the first member's class. It pickles, saves and loads as a module does, with
    ``members.0.…``, ``members.1.…`` in its ``state_dict``. Use ``torch.export`` or ``to_torchscript(method="trace")``
    to serve it without this package. Source: `Deep Ensembles <https://arxiv.org/abs/1612.01474>`_.

    Args:
        members: LightningModules that take the same inputs and do not change them in place. Their architectures may
            differ. A submodule that several members share is shared by the copies.
        outputs: Kind of the combined call's output: ``"values"`` (of a regression; tuples, lists and dictionaries are
            averaged leaf by leaf), ``"logits"`` of classes that exclude each other, ``"binary_logits"`` (each element
            is a decision of its own) or ``"probabilities"``, whose range is checked in the first call. Half precision
            is combined, and returned, in fp32.
        on: The submodule whose call is combined, for instance ``"net"`` if the steps call ``self.net(x)``; every
            member's own submodule of this name is called. ``None``, the default: the members' ``forward``, for steps
            that call ``self(x)``.
        dim: The dimension of the classes in logits. ``None``, the default: the last of at most two dimensions; with
            more than two it must be given.

    Raises:
        ValueError: If an argument is not allowed, or ``"probabilities"`` are not between 0 and 1.
        MisconfigurationException: If a step does not reach the combined call, since its values would be those of one
            member; and in ``trainer.fit``.

    Example::

        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> models = [BoringModel(), BoringModel()]
        >>> ensemble = Ensemble(models, outputs="values")
        >>> x = torch.ones(1, 32)
        >>> torch.allclose(ensemble(x), (models[0](x) + models[1](x)) / 2)
        True

    With a Trainer, for classifiers whose ``test_step`` calls ``self.net(x)``::

        trainer.test(Ensemble(models, outputs="logits", on="net"), test_loader)
    """

    _class_arguments: tuple[Any, ...] = ()  # set in a class that `ensemble_class` has made at run time
    _combined: CombinedCall
    _checked_steps: set[str]
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
        """Load one member from each checkpoint, as Lightning or :func:`~lightning_optim.fit_members` wrote it.

        Args:
            member_class: The members' class.
            paths: One checkpoint for each member.
            outputs: As for the class.
            on: As for the class.
            dim: As for the class.
            kwargs: Passed to ``member_class.load_from_checkpoint``: arguments of the class that the checkpoints do not
                hold, or ``map_location``. Objects other than tensors and plain values are only unpickled with
                ``weights_only=False``.

        Raises:
            ValueError: If an argument is not allowed, or a checkpoint is damaged or holds other objects.

        Example::

            ensemble = Ensemble.from_checkpoints(Net, ["a.ckpt", "b.ckpt"], outputs="logits", on="net")
        """
        check_arguments(outputs, on, dim)
        files = [paths] if isinstance(paths, str | Path) else list(paths)
        if not files:
            raise ValueError("`paths` must name at least one checkpoint, one for each member, got []")
        members = [ensemble_checkpoint.load_member(member_class, path, kwargs) for path in files]
        return cls._without_copies(members, outputs, on, dim)

    @ClassMethodOnly  # type: ignore[arg-type]
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
        """Load an ensemble from a checkpoint that ``trainer.save_checkpoint`` wrote while it evaluated an ensemble.

        The checkpoint holds ``outputs``, ``on`` and ``dim``, and for each member the name of its class and the content
        of a checkpoint of that member. Each member is made by the ``load_from_checkpoint`` of its own class.

        Args:
            checkpoint_path: The checkpoint.
            map_location: Device of the members, as for their own ``load_from_checkpoint``; the CPU by default.
            hparams_file: Passed to the members' ``load_from_checkpoint``.
            strict: Passed to the members' ``load_from_checkpoint``.
            weights_only: ``False`` unpickles the checkpoint and imports the members' classes by the names in it, which
                can run any code: only for checkpoints that you trust. Otherwise nothing that the checkpoint names is
                called, and ``member_class`` or ``members`` must be given.
            members: Modules with the members' architectures, in their order; they are copied, and the weights loaded.
            member_class: The members' class, or a list with the class of each.
            outputs: Used in place of the checkpoint's value.
            on: Used in place of the checkpoint's value.
            dim: Used in place of the checkpoint's value.
            kwargs: Arguments of the members' class that the checkpoint does not hold, or that replace those it holds.

        Raises:
            ValueError: If the checkpoint is damaged, is not of an ensemble, or needs an argument that is not given.
            RuntimeError: If its weights do not fit the members.
        """
        trusted = weights_only is False
        checkpoint = ensemble_checkpoint.read(checkpoint_path, weights_only=not trusted)
        given = {name: value for name, value in {"outputs": outputs, "on": on, "dim": dim}.items() if value is not None}
        arguments = ensemble_checkpoint.arguments_in(checkpoint) | given
        if members is None:
            classes = ensemble_checkpoint.classes_in(checkpoint_path, checkpoint, member_class, not trusted)
            loads = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict, **kwargs}
            options = {"weights_only": not trusted, **loads}
            made = ensemble_checkpoint.build_members(checkpoint_path, checkpoint, classes, options)
            return cls._without_copies(made, **arguments)
        ensemble = cls(members, **arguments)
        ensemble.on_load_checkpoint(checkpoint)
        ensemble.load_state_dict(checkpoint["state_dict"], ensemble.strict_loading if strict is None else strict)
        return ensemble

    @classmethod
    def _without_copies(
        cls, members: list[LightningModule], outputs: Any = None, on: Any = None, dim: Any = None
    ) -> Ensemble:
        """Make an ensemble that holds these members themselves, not copies."""
        ensemble = cls.__new__(cls)
        checked = checked_members(members)
        check_arguments(outputs, on, dim)
        ensemble._assemble(checked, outputs, on, dim)
        return ensemble

    def _assemble(self, members: list[LightningModule], outputs: Any, on: str | None, dim: int | None) -> None:
        early = [name for name, value in vars(self).items() if isinstance(value, nn.Module | nn.Parameter)]
        if early:  # torch says so only in a class that is a module already
            raise AttributeError(
                f"{type(self).__name__} sets {early} before `super().__init__(…)`, which makes it a module: set them"
                " after that call."
            )
        for member in members:
            uncompile_(member)
        first = members[0]
        instance_steps = tuple(name for name in STEPS if name in vars(first))
        self.__class__ = ensemble_class(type(self), type(first), instance_steps, Ensemble.forward)
        # A LightningModule of the first member's package, without a call of the constructor of the member's class.
        self.__dict__.update(vars(lightning_module_class(first)()))
        # Copy what the steps find on `self`. Modules and tensors are looked up in the first member, where they have a
        # name; so are steps that it has on the instance, since they must reach the combined call as those of a class.
        for name, value in vars(first).items():
            if name not in _TORCH and name not in STEPS and name not in vars(Ensemble):
                bound = isinstance(value, types.MethodType) and value.__self__ is first
                self.__dict__[name] = types.MethodType(value.__func__, self) if bound else value
        detach_trainer(self)  # the first member's, if it was trained
        self.members = Members(members)
        self.__dict__.update(_combined=CombinedCall(self.members, outputs, on, dim), _checked_steps=set())
        self._insert_combined_call()
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()
        self.requires_grad_(False)
        self.eval()

    def _insert_combined_call(self) -> None:
        """Put the combined call where the steps look for ``on``."""
        on, first = self._combined.on, self.members[0]
        self.__dict__["_replaced"] = {}
        for name in registered_names(first):
            self.__dict__.pop(name, None)  # an attribute such as `net = None` that `configure_model` has set since
        if on is None:
            return
        for index, member in enumerate(self.members):
            if not has_submodule(member, on):
                if is_overridden("configure_model", member):
                    return  # `configure_model` may still create the submodule
                raise missing_submodule(member, index, on)
        self.__dict__["_replaced"] = with_replacement(first, on, self._combined)

    # ---- the combined call -------------------------------------------------------------------------------------------

    @without_gradients
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mean prediction; with ``on``, run the first member's ``forward`` with the combined call in it."""
        if self._combined.on is None:
            return self._combined(*args, **kwargs)
        with self._combined.expected_in("forward"):
            own = instance_method(self, "forward")
            return super().forward(*args, **kwargs) if own is None else own(*args, **kwargs)

    @without_gradients
    def member_outputs(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the output of the combined call in each member, to measure how much they differ.

        Example::

            Disagreement()(ensemble.member_outputs(x))
        """
        return list(self._combined.member_outputs(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if not isinstance(self, nn.Module):
            raise AttributeError(f"{type(self).__name__} has no attribute `{name}` before `super().__init__(…)`")
        if "_replaced" not in own or is_registered(self, name):
            return super().__getattr__(name)
        if name in own["_replaced"]:
            return own["_replaced"][name]
        try:
            return getattr(submodule_of(self, "members")[0], name)
        except AttributeError:
            return super().__getattr__(name)

    # ---- no training -------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Ensemble:
        """Stay in eval mode, so that dropout and BatchNorm of the members do not train."""
        return super().train(False)

    def training_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error, since an ensemble does not train."""
        raise MisconfigurationException(
            "An Ensemble is for `validate`, `test` and `predict`, and does not train: fit its members one by one, or"
            " with `fit_members`, and make the Ensemble of the fitted members."
        )

    def configure_optimizers(self) -> NoReturn:
        """Raise an error, since an ensemble does not train."""
        self.training_step()

    # ---- the Trainer's hooks -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Call the first member's ``setup``; raise for ``"fit"``."""
        if stage == "fit":
            self.training_step()
        for member in self.members:
            member.trainer = self.trainer
        self._checked_steps.clear()
        super().setup(stage)

    def configure_model(self) -> None:
        """Call each member's ``configure_model``, which may shard it."""
        sharded = is_attached(self) and isinstance(self.trainer.strategy, ModelParallelStrategy)
        member: Any
        for member in self.members:
            if is_overridden("configure_model", member):
                share_device_mesh(self, member)
                member.configure_model()
            elif sharded:
                raise MisconfigurationException(
                    f"Under ModelParallelStrategy a model is sharded in `configure_model`, which"
                    f" {type(member).__name__} does not override: override it, or evaluate the ensemble with DDP."
                )
        self._insert_combined_call()
        self.requires_grad_(False)

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the members' states, under ``members.0.…``, ``members.1.…``."""
        return nn.Module.state_dict(self, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what :meth:`state_dict` returned; each member loads its own part."""
        return ensemble_checkpoint.load_weights(self.members, state_dict, strict, assign)

    @property
    def strict_loading(self) -> bool:
        """True if any member loads strictly; each member loads its own part strictly or not."""
        return any(bool(member.strict_loading) for member in self.members)

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        member: Any
        for member in self.members:
            member.strict_loading = strict_loading

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Call each member's ``on_save_checkpoint``, and add what :meth:`load_from_checkpoint` needs."""
        arguments = {"outputs": self._combined.outputs, "on": self._combined.on, "dim": self._combined.dim}
        ensemble_checkpoint.save_members(self.members, arguments, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Call each member's ``on_load_checkpoint``."""
        ensemble_checkpoint.load_members(self.members, checkpoint)

    def __prepare_scriptable__(self) -> NoReturn:
        # `torch.jit.script` calls this first, and so does `to_torchscript()`.
        raise MisconfigurationException(
            'An Ensemble calls its members from Python, which TorchScript does not compile: use `method="trace"`'
            " with `example_inputs`, or `torch.export.export(ensemble, …)`."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle cannot find it by its name.
        base, *arguments = type(self)._class_arguments
        return base._new, tuple(arguments), self.__getstate__()

    @classmethod
    def _new(cls, member_class: type[LightningModule], instance_steps: tuple[str, ...]) -> Ensemble:
        """Make an ensemble without content, for pickle."""
        made: type[Ensemble] = ensemble_class(cls, member_class, instance_steps, Ensemble.forward)
        return made.__new__(made)
