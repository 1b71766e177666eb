"""Drop weights of a layer instead of its outputs: DropConnect."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim.base.arguments import check_number
from lightning_optim.base.recurrent_weights import with_weights
from lightning_optim.regularization.dropout.masks import mask


class WeightDrop(nn.Module):
    r"""Drop weights of a layer: :math:`w \cdot m / (1 - p)`, :math:`m \sim B(1 - p)`, drawn once in each forward pass.

    DropConnect (`Wan et al. <https://proceedings.mlr.press/v28/wan13.html>`_), in training only. On the weights from
    one hidden state to the next it regularizes a recurrent layer without noise in its states: Merity et al.,
    *Regularizing and Optimizing LSTM Language Models*, `arXiv:1708.02182 <https://arxiv.org/abs/1708.02182>`_. The
    layer keeps its raw weights as its parameters: penalties, averages and checkpoints see these.

    Args:
        module: The layer: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells, of which the weights ``weight_hh…`` are
            dropped; or a linear layer, a convolution or any other module with weights of its own, of which those with
            two dimensions or more are dropped. The layer keeps its names, behind ``module.``.
        drop_prob: Probability p in [0, 1] that a weight is dropped. Default 0.5.

    Shape:
        As ``module``.

    Raises:
        ValueError: If ``drop_prob`` is not a number in [0, 1], or ``module`` is no module with such weights.

    Example::

        >>> layer = WeightDrop(nn.LSTM(4, 8), 0.5)
        >>> [name for name, _ in layer.named_parameters()][:2]
        ['module.weight_ih_l0', 'module.weight_hh_l0']
        >>> outputs, (hidden, cell) = layer(torch.ones(3, 1, 4))
        >>> outputs.shape
        torch.Size([3, 1, 8])
        >>> callback = ScheduledDropout({"*": Linear(0.0, 0.5)})  # sets `drop_prob`, for Trainer(callbacks=[callback])
    """

    def __init__(self, module: nn.Module, drop_prob: float = 0.5) -> None:
        super().__init__()
        check_number("drop_prob", drop_prob, low=0.0, high=1.0)
        if not isinstance(module, nn.Module) or not weights_of(module):
            shown = type(module).__name__ if isinstance(module, nn.Module) else repr(module)
            raise ValueError(
                "`module` must be a layer that has weights of its own with two dimensions or more (a lazy one has them"
                f" after its first forward pass), got {shown}"
            )
        self.module, self.drop_prob = module, drop_prob

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with dropped weights."""
        if not self.training or self.drop_prob == 0.0:
            return self.module(*args, **kwargs)
        return self.drop(self.drop_prob, *args, **kwargs)

    def drop(self, rate: float | Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with weights dropped at a rate that is a number or a tensor without dimensions."""
        return call_with_dropped(self.module, self.module, lambda _, weight: mask(weight, rate), args, kwargs)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


def call_with_dropped(
    module: nn.Module,
    call: Callable[..., Any],
    draw: Callable[[str, Tensor], Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a layer whose weights are multiplied by factors for this call, also if it raises.

    Args:
        module: The layer.
        call: The layer, or what its ``forward`` was.
        draw: Returns the factors of a weight, from the weight's name and the weight.
        args: Arguments of the call.
        kwargs: Arguments of the call by name.
    """
    weights = weights_of(module, computed=call is not module)
    dropped = {name: weight * draw(name, weight) for name, weight in weights.items()}
    return with_weights(module, dropped, call, args, kwargs)


def weights_of(module: nn.Module, computed: bool = False) -> dict[str, Tensor]:
    """Return the weights of a layer that are dropped, by name.

    Args:
        module: The layer.
        computed: Return a weight that a hook has computed for this call, as pruning does, in place of the parameters
            from which it was computed.

    Example::

        >>> list(weights_of(nn.GRU(2, 2, num_layers=2))), list(weights_of(nn.Linear(2, 2)))
        (['weight_hh_l0', 'weight_hh_l1'], ['weight'])
    """
    names = "weight_hh" if isinstance(module, nn.RNNBase | nn.RNNCellBase) else ""
    own: dict[str, Tensor] = {name: p for name, p in module.named_parameters(recurse=False) if name.startswith(names)}
    if computed:
        made = {name: _made_of(name) for name in own if isinstance(vars(module).get(_made_of(name)), Tensor)}
        own = {made.get(name, name): getattr(module, made.get(name, name)) for name in own}
    return {name: weight for name, weight in own.items() if not is_lazy(weight) and weight.ndim >= 2}


def _made_of(name: str) -> str:
    """Return the name of what a hook computes from a parameter: ``weight`` from the ``weight_orig`` of pruning."""
    return re.sub("_(orig|g|v)$", "", name)
