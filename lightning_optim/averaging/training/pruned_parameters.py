"""Keep an average pruned as its weights are: masks in the middle of a run, and pruning that is made permanent.

``torch.nn.utils.prune`` renames a parameter to ``weight_orig`` and sets ``weight = weight_orig * weight_mask`` before
each forward. When pruning is made permanent, the parameter is multiplied by the mask and gets its name back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_optim.base.module_registry import buffer_of, forward_pre_hooks, parameter_of
from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime.lightning import Callback, MisconfigurationException
from lightning_optim.runtime.lightning.pruning import (
    pruned_name,
    prunes_in_validation,
    resets_weights,
)

_RENAMED, _MASK = "_orig", "_mask"


@dataclass(eq=False)
class Pruned:
    """Hold a pruned parameter, the submodule that has it, the hook that masks it, and the mask."""

    owner: nn.Module
    hook: BasePruningMethod
    name: str
    parameter: nn.Parameter
    mask: Tensor

    @property
    def product(self) -> Any:
        """Product of weight and mask, an attribute of the submodule that each forward sets again."""
        return vars(self.owner).get(self.name)

    @product.setter
    def product(self, value: Any) -> None:
        setattr(self.owner, self.name, value)

    @property
    def holds(self) -> bool:
        """True if the parameter is still pruned with this mask."""
        return buffer_of(self.owner, self.name + _MASK) is self.mask


def pruned_in(module: nn.Module) -> list[Pruned]:
    """Return the parameters that are pruned now."""
    found = []
    for owner in module.modules():
        for hook in forward_pre_hooks(owner):
            if isinstance(hook, BasePruningMethod):
                name = pruned_name(hook)
                parameter, mask = parameter_of(owner, name + _RENAMED), buffer_of(owner, name + _MASK)
                if parameter is not None and mask is not None:
                    found.append(Pruned(owner, hook, name, parameter, mask))
    return found


class Pruning:
    """Follow the pruned parameters of one module during a run, and their products."""

    def __init__(self) -> None:
        self._pruned: list[Pruned] = []
        self._before: list[tuple[Pruned, Any]] = []

    @property
    def changed(self) -> bool:
        """True if a mask that was in use at the last look no longer is."""
        return not all(pruned.holds for pruned in self._pruned)

    def ended(self, module: nn.Module) -> dict[int, Tensor]:
        """Return the masks, by ``id`` of the parameter, whose pruning was made permanent since the last call."""
        before, self._pruned = self._pruned, pruned_in(module)
        now = {id(pruned.parameter) for pruned in self._pruned}
        return {id(pruned.parameter): pruned.mask for pruned in before if id(pruned.parameter) not in now}

    def exchange_products(self, module: nn.Module, averaged: bool) -> None:
        """Set the products to those of the averaged weights in the module, or back to those from before."""
        if averaged:
            self._before = [(pruned, pruned.product) for pruned in self._pruned]
            apply_masks_(module)
            return
        for pruned, before in self._before:
            if pruned.holds:
                pruned.product = before
        self._before = []


@torch.no_grad()
def apply_masks_(module: nn.Module) -> None:
    """Set each product of a pruned weight and its mask, as the next forward would."""
    for pruned in pruned_in(module):
        pruned.product = pruned.hook.apply_mask(pruned.owner)  # type: ignore[no-untyped-call]


def masks_by_name(module: nn.Module) -> dict[str, Tensor]:
    """Return the mask of each pruned parameter by name."""
    masks = {id(pruned.parameter): pruned.mask for pruned in pruned_in(module)}
    named = module.named_parameters(remove_duplicate=False) if masks else ()
    return {plain_name(name): masks[id(parameter)] for name, parameter in named if id(parameter) in masks}


def permanent(tree: Any, masks: dict[str, Tensor]) -> Any:
    """Make pruning permanent in a state: multiply weights by their masks and use the names of an unpruned model.

    Args:
        tree: Dictionaries from names to tensors and lists of names, nested in dictionaries and lists.
        masks: The result of :func:`masks_by_name`. If it is empty, the state is returned as it is.
    """
    if not masks:
        return tree
    if isinstance(tree, list):
        return [permanent(item, masks) for item in tree]
    if not isinstance(tree, dict):
        return _name(tree) if isinstance(tree, str) and plain_name(tree) in masks else tree
    dropped = {_name(name) + _MASK for name in masks}
    result = {}
    for name, value in tree.items():
        if isinstance(name, str) and (mask := masks.get(plain_name(name))) is not None and isinstance(value, Tensor):
            result[_name(name)] = value.detach() * mask.to(value)
        elif not isinstance(name, str) or plain_name(name) not in dropped:
            result[name] = permanent(value, masks)
    return result


def _name(name: str) -> str:
    return name.removesuffix(_RENAMED)


def refuse_within_validation(callbacks: Iterable[Callback], name: str) -> None:
    """Refuse a ``ModelPruning`` that writes to the weights during a validation, when the module holds the average.

    Raises:
        MisconfigurationException: If there is one. The message names the ways out.
    """
    for callback in callbacks:
        if prunes_in_validation(callback) and resets_weights(callback):
            raise MisconfigurationException(
                f"{type(callback).__name__}(prune_on_train_epoch_end=False) sets weights back to their first values"
                f" within the validation, in which the module holds the weights of {name}(evaluate=True). Leave"
                " `prune_on_train_epoch_end=True`, or pass `use_lottery_ticket_hypothesis=False`."
            )
