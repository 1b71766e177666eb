"""Call a layer with other weights, also a recurrent one, which keeps a list of its weights under a private name.

Nothing else in the package names it. A test says if a new version of torch has renamed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["with_weights"]


def with_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Return ``call(*args, **kwargs)``, in which ``module`` uses ``weights`` in the place of its parameters.

    The parameters are in place again afterwards, also if the call raises.

    Args:
        module: The module.
        weights: Other tensors by the names of its own parameters.
        call: The module, or a function that uses it, such as the ``forward`` that it had before a patch.
        args: Arguments of the call.
        kwargs: Arguments of the call by name.

    Example::

        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with_weights(layer, {"weight": torch.ones(1, 2)}, layer, (torch.tensor([2.0, 3.0]),), {})
        tensor([5.])
    """
    if isinstance(module, nn.RNNBase):
        eager = torch.compiler.disable(_recurrent)  # type: ignore[no-untyped-call]
        return eager(module, weights, call, args, kwargs)  # torch compiles no recurrent layer
    caller = _Caller(module, call)
    return torch.func.functional_call(
        caller, {f"module.{name}": weight for name, weight in weights.items()}, args, kwargs
    )


class _Caller(nn.Module):
    """Stand for a call in ``functional_call``, which calls modules: it calls ``forward`` without the hooks."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.held = module, (call,)  # in a tuple, since a module would be registered twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.held[0](*args, **kwargs)


def _recurrent(
    module: nn.RNNBase,
    weights: Mapping[str, Tensor],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Put the weights into the list that the layer reads.

    ``functional_call`` would make the layer copy all of its weights into one block of memory in each call, on CUDA.
    """
    module._update_flat_weights()  # the layer does so in its forward, if its parameters are other objects than before
    before = module._flat_weights
    other = {id(getattr(module, name)): weight for name, weight in weights.items()}
    module._flat_weights = [other.get(id(weight), weight) for weight in before]
    try:
        return call(*args, **kwargs)
    finally:
        module._flat_weights = before
