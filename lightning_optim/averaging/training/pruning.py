"""Masks of weights that are pruned in the middle of a run, and the end of pruning, when it is made permanent.

``torch.nn.utils.prune`` renames a parameter to ``weight_orig`` and puts ``weight_orig * weight_mask`` in its place
before each forward. To make it permanent is to multiply once and to give the parameter its name back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from lightning_optim.base.module_tensors import plain_name
from lightning_optim.runtime.lightning import Callback, MisconfigurationException, ModelPruning

_RENAMED, _MASK = "_orig", "_mask"


@dataclass(eq=False)
class Pruned:
    """A pruned parameter, and where it is in the model."""

    owner: nn.Module
    hook: BasePruningMethod
    parameter: nn.Parameter
    mask: Tensor

    @property
    def product(self) -> Any:
        """The product with which the module computes: an attribute, made anew before each forward."""
        return vars(self.owner).get(self.hook._tensor_name)

    @product.setter
    def product(self, value: Any) -> None:
        setattr(self.owner, self.hook._tensor_name, value)

    @property
    def holds(self) -> bool:
        """Whether it is pruned with this mask still."""
        return self.owner._buffers.get(self.hook._tensor_name + _MASK) is self.mask


def pruned_in(module: nn.Module) -> list[Pruned]:
    """Find the parameters that are pruned now."""
    found = []
    for owner in module.modules():
        for hook in owner._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                parameter = owner._parameters.get(hook._tensor_name + _RENAMED)
                mask = owner._buffers.get(hook._tensor_name + _MASK)
                if parameter is not None and mask is not None:
                    found.append(Pruned(owner, hook, parameter, mask))
    return found


class Pruning:
    """The pruning of one module as a run goes on: what is pruned, and the products with which the module computes."""

    def __init__(self) -> None:
        self._pruned: list[Pruned] = []
        self._before: list[tuple[Pruned, Any]] = []

    @property
    def changed(self) -> bool:
        """Whether a mask that was seen last is no longer in use."""
        return not all(pruned.holds for pruned in self._pruned)

    def ended(self, module: nn.Module) -> dict[int, Tensor]:
        """Return the masks, by the ``id`` of the parameter, of pruning made permanent since this was called last."""
        before, self._pruned = self._pruned, pruned_in(module)
        now = {id(pruned.parameter) for pruned in self._pruned}
        return {id(pruned.parameter): pruned.mask for pruned in before if id(pruned.parameter) not in now}

    def exchange_products(self, module: nn.Module, averaged: bool) -> None:
        """Let the module compute with the average that was put in, or again with the products from before."""
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
    """Compute the product of each pruned weight and its mask anew, as a forward would."""
    for pruned in pruned_in(module):
        pruned.product = pruned.hook.apply_mask(pruned.owner)  # type: ignore[no-untyped-call]


def masks_by_name(module: nn.Module) -> dict[str, Tensor]:
    """Map the name of each parameter that is pruned to its mask."""
    masks = {id(pruned.parameter): pruned.mask for pruned in pruned_in(module)}
    named = module.named_parameters(remove_duplicate=False) if masks else ()
    return {plain_name(name): masks[id(parameter)] for name, parameter in named if id(parameter) in masks}


def is_permanent_in_checkpoints(callbacks: Iterable[Callback]) -> bool:
    """Return whether a callback writes pruned weights into checkpoints as if pruning were permanent."""
    return any(isinstance(callback, ModelPruning) and callback._make_pruning_permanent for callback in callbacks)


def permanent(tree: Any, masks: dict[str, Tensor]) -> Any:
    """Return a state in which pruning is permanent: weights are masked, and all names are those of an unpruned model.

    Args:
        tree: Dictionaries from names to tensors, and lists of names, perhaps in other dictionaries and lists.
        masks: What :func:`masks_by_name` returned.
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
    """Refuse a pruning that writes to the weights within a validation, while the module holds an average.

    Raises:
        MisconfigurationException: With the ways out.
    """
    for callback in callbacks:
        if not isinstance(callback, ModelPruning) or callback._prune_on_train_epoch_end:
            continue
        if callback._use_lottery_ticket_hypothesis:
            raise MisconfigurationException(
                f"{type(callback).__name__}(prune_on_train_epoch_end=False) sets weights back to their first values"
                f" within the validation, in which the module holds the weights of {name}(evaluate=True). Leave"
                " `prune_on_train_epoch_end=True`, or pass `use_lottery_ticket_hypothesis=False`."
            )
