"""Check, prepare and hold the members of an ensemble."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_optim.ensembling.combined_call import CombinedCall
from lightning_optim.runtime.lightning import LightningModule
from lightning_optim.runtime.lightning.modules import undo_compilation_
from lightning_optim.runtime.lightning.torch_internals import set_state_metadata, state_metadata, uncompiled

_NAMES = ("members", "member_outputs", "from_checkpoints")  # attributes that only an ensemble has


class Members(nn.ModuleList):
    """Hold the members. Each returns its own ``state_dict``, since its class may save a part of it, or other names."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the members' states, with the member's number before each name."""
        if destination is None:
            destination = OrderedDict()
            set_state_metadata(destination, {})
        for index, member in enumerate(self):
            own = member.state_dict(keep_vars=True) if keep_vars else member.state_dict()
            destination.update({f"{prefix}{index}.{name}": value for name, value in own.items()})
            if (metadata := state_metadata(destination)) is not None:
                about = state_metadata(own) or {}
                metadata.update({f"{prefix}{index}.{name}".rstrip("."): v for name, v in about.items()})
        return destination


def checked_members(members: Any) -> list[LightningModule]:
    """Return the members as a list, or raise if they cannot form an ensemble."""
    given = [] if isinstance(members, nn.Module | str) or not isinstance(members, Iterable) else list(members)
    given = [uncompiled(member) for member in given]  # of `torch.compile(member)`
    if not given:
        raise ValueError(f"`members` must be a list of at least one LightningModule, got {type(members).__name__}")
    for member in given:
        if not isinstance(member, LightningModule):
            raise ValueError(f"`members` must be LightningModules, got a {type(member).__name__}")
        if isinstance(member.__dict__.get("_combined"), CombinedCall):
            raise ValueError(
                f"`members` must be LightningModules and no Ensembles, got a {type(member).__name__}: pass the members"
                " of all of them, `[*one.members, *other.members]`."
            )
        if any(isinstance(module, FSDPModule) for module in member.modules()):
            raise ValueError(
                f"`members` must be whole, and this {type(member).__name__} is sharded: make a new one, load its"
                " weights, and let `configure_model` shard it in the Trainer that evaluates the ensemble."
            )
    if clashing := [name for name in _NAMES if hasattr(given[0], name)]:
        raise ValueError(
            f"`members` must not have the attributes {clashing}, whose names an Ensemble uses: rename them in"
            f" {type(given[0]).__name__}."
        )
    return given


def uncompile_(member: LightningModule) -> None:
    """Give a member back the methods that a fit of ``torch.compile(member)`` replaced.

    Lightning leaves methods on the instance that call the module that was fitted; a copy's would not call the copy.
    """
    try:
        undo_compilation_(member)
    except ValueError:  # it is not compiled
        return
    for name, method in list(vars(member).items()):
        if isinstance(method, types.MethodType) and method.__func__ is getattr(type(member), name, None):
            del member.__dict__[name]
