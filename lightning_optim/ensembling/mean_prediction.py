"""Combine the predictions of several models into their mean, in the space in which the mean is exact. Pure torch.

Each function takes the members' outputs one by one and keeps one running result. A generator that calls the members
therefore needs the memory of one output, not of all of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_optim.base.dtypes import accumulation_dtype, has_mean
from lightning_optim.runtime.lightning.torch_internals import (
    assert_in_graph,
    is_exporting,
    structure_of,
    tree_flatten,
    tree_unflatten,
)

Outputs: TypeAlias = Literal["values", "logits", "binary_logits", "probabilities"]

_NO_OUTPUT = "There is no output to average: pass the outputs of at least one member."
_DIFFER = (
    "The members' outputs differ in a part that cannot be averaged (it is not a floating-point tensor): return scores"
    " and not labels, or name with `on` a submodule that does."
)


def mean_prediction(outputs: Iterable[Any], kind: Outputs, dim: int | None = None) -> Any:
    """Combine the members' outputs into the output of their mean prediction, of the same kind.

    Args:
        outputs: One output for each member.
        kind: Kind of an output: ``"values"`` (:func:`mean_values`), ``"probabilities"`` (the same, of a single tensor),
            ``"logits"`` (:func:`mean_logits`) or ``"binary_logits"`` (:func:`mean_binary_logits`).
        dim: The dimension of the classes, for ``"logits"``.
    """
    if kind == "values":
        return mean_values(outputs)
    tensors = (_single_tensor(output, kind) for output in outputs)
    if kind == "probabilities":
        return mean_values(tensors)
    return mean_logits(tensors, dim) if kind == "logits" else mean_binary_logits(tensors)


def mean_values(outputs: Iterable[Any]) -> Any:
    r"""Average the members' outputs, :math:`\frac{1}{M} \sum_i y_i`, leaf by leaf in tuples, lists and dictionaries.

    Named tuples of different classes are averaged if they have the same fields; the mean is of the first one's class.
    Half precision is summed, and returned, in fp32. A leaf that cannot be averaged (an integer, a boolean, a string,
    ``None``) must be the same in all outputs, and is passed through.

    Raises:
        ValueError: If the outputs differ in structure, in a shape, or in a leaf that cannot be averaged.

    Example::

        >>> mean_values([{"y": torch.tensor([1.0]), "n": 3}, {"y": torch.tensor([2.0]), "n": 3}])
        {'y': tensor([1.5000]), 'n': 3}
    """
    sums: list[Any] = []
    first, expected, count = None, None, 0
    for output in outputs:
        leaves, structure = tree_flatten(output)
        count += 1
        if first is None:
            first, expected = structure, structure_of(output)
            sums = [_upcast(leaf) if has_mean(leaf) else leaf for leaf in leaves]
        elif structure_of(output) != expected:
            raise ValueError(f"The members' outputs differ in structure and have no mean: {first} and {structure}")
        else:
            sums = [_add(total, leaf) for total, leaf in zip(sums, leaves, strict=True)]
    if first is None:
        raise ValueError(_NO_OUTPUT)
    return tree_unflatten([leaf / count if has_mean(leaf) else leaf for leaf in sums], first)


def log_mean_exp(values: Iterable[Tensor]) -> Tensor:
    r"""Return the logarithm of a mean, :math:`\log \frac{1}{M} \sum_i e^{v_i}`, without overflow or underflow.

    Args:
        values: Tensors of one shape, for instance log-probabilities; or one tensor with the members in its first
            dimension. Half precision is computed, and returned, in fp32: in fp16 ``softmax().mean().log()`` is ``-inf``
            for every probability below 6e-8.

    Example::

        >>> log_mean_exp([torch.tensor([-1000.0]), torch.tensor([-1000.0])])
        tensor([-1000.])
    """
    total: Tensor | None = None
    count = 0
    for value in map(_upcast, values):
        total, count = _logaddexp(total, value), count + 1
    if total is None:
        raise ValueError(_NO_OUTPUT)
    return total - math.log(count)


def mean_logits(logits: Iterable[Tensor], dim: int | None = None) -> Tensor:
    r"""Return the log of the mean probability, :math:`\log \frac{1}{M} \sum_i \mathrm{softmax}(z_i)`.

    The result is normalized: its softmax is the mean probability, and cross entropy on it is the log loss of the mean.
    Log-softmax does not change normalized values, so log-probabilities may be passed as well.

    Args:
        logits: Tensors of one shape.
        dim: The dimension of the classes. ``None``: the last one of tensors with one or two dimensions. With more
            dimensions it must be given, because ``[batch, class, …]`` and ``[batch, token, class]`` look alike.

    Raises:
        ValueError: If the dimension of the classes is not known, or holds a single class, whose probability is always
            one.

    Example::

        >>> mean_logits([torch.tensor([0.0, 0.0]), torch.tensor([9.0, 9.0])]).exp()
        tensor([0.5000, 0.5000])
    """
    return log_mean_exp(torch.log_softmax(_upcast(z), _class_dim(z, dim)) for z in logits)


def mean_binary_logits(logits: Iterable[Tensor]) -> Tensor:
    r"""Return the logit of the mean probability, :math:`\log \sum_i \sigma(z_i) - \log \sum_i \sigma(-z_i)`.

    Both sums are kept as logarithms: in fp32 ``logit(mean(sigmoid(z)))`` is infinite for logits of 17 and more.

    Args:
        logits: Tensors of one shape; each element is a decision of its own.

    Example::

        >>> mean_binary_logits([torch.tensor([0.0, 30.0]), torch.tensor([0.0, 30.0])])
        tensor([ 0., 30.])
    """
    yes: Tensor | None = None
    no: Tensor | None = None
    for z in map(_upcast, logits):
        yes, no = _logaddexp(yes, logsigmoid(z)), _logaddexp(no, logsigmoid(-z))
    if yes is None or no is None:
        raise ValueError(_NO_OUTPUT)
    return yes - no


def _logaddexp(total: Tensor | None, value: Tensor) -> Tensor:
    if total is None:
        return value
    _check_shapes(total, value)
    return torch.logaddexp(total, value)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


def _add(total: Any, leaf: Any) -> Any:
    if has_mean(total) and has_mean(leaf):
        _check_shapes(total, leaf)
        return total + leaf
    tensors = isinstance(total, Tensor) and isinstance(leaf, Tensor)
    if has_mean(total) or has_mean(leaf) or type(total) is not type(leaf):
        raise ValueError(_DIFFER)
    if tensors and _tracing():
        raise ValueError(
            "The members' outputs have a part that cannot be averaged (it is not a floating-point tensor) and must be"
            " the same for all members, which a traced program cannot check: use `torch.export`, or trace an ensemble"
            " whose members return only what can be averaged"
        )
    if tensors and is_exporting():
        # An exported program cannot branch on values: it asserts when it runs.
        _check_shapes(total, leaf)
        assert_in_graph((total == leaf).all(), _DIFFER)
    elif not (torch.equal(total, leaf) if tensors else total == leaf):
        raise ValueError(_DIFFER)
    return total


def _check_shapes(one: Tensor, other: Tensor) -> None:
    # Shapes that broadcast, such as [8] and [8, 1], would give a result of a third shape.
    if _shape(one) != _shape(other):
        raise ValueError(
            f"The members' outputs differ in shape and have no mean: {list(one.shape)}, {list(other.shape)}"
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    if not _tracing():
        return tuple(tensor.shape)
    with warnings.catch_warnings():  # sizes are tensors while torch traces; reading them in a check changes nothing
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(map(int, tensor.shape))


def _tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call]


def _single_tensor(output: Any, kind: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"`outputs={kind!r}` is for members that return one tensor, got {type(output).__name__}: name with `on` the"
            f' submodule that returns the {kind} alone. Only `outputs="values"` is averaged leaf by leaf'
        )
    return output


def _class_dim(logits: Tensor, dim: int | None) -> int:
    if dim is None and logits.ndim > 2:
        raise ValueError(
            f"The dimension of the classes is not known for logits of shape {list(logits.shape)}: pass `dim=1` for"
            " [batch, class, …], `dim=-1` for [batch, …, class]"
        )
    dim = -1 if dim is None else dim
    if _shape(logits)[dim] == 1:
        raise ValueError(
            f"Logits of shape {list(logits.shape)} have one class, whose probability is 1 for every logit: use"
            ' `outputs="binary_logits"` for one logit per decision'
        )
    return dim
