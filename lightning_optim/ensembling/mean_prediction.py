"""The mean of several predictions, computed in the space in which it is exact; and how far they are apart. Pure torch.

Each function takes the members' outputs one by one and keeps one running result, so a generator that calls the members
holds the outputs of one at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_optim.base.foreach import accumulation_dtype

Outputs: TypeAlias = Literal["values", "logits", "binary_logits", "probabilities"]

_DIFFER = (
    "The members' outputs differ in a part that cannot be averaged (it is not a floating-point tensor): return scores"
    " and not labels, or name with `on` a submodule that does"
)
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # the former from torch 2.7 on


def combine(outputs: Iterable[Any], kind: Outputs, dim: int | None = None) -> Any:
    """The members' outputs as one output of the same kind, that of the mean prediction.

    Args:
        outputs: One output for each member.
        kind: What they are: ``"values"`` (:func:`mean`), ``"probabilities"`` (the same, of one tensor), ``"logits"``
            (:func:`mean_logits`) or ``"binary_logits"`` (:func:`mean_binary_logits`).
        dim: The dimension of the classes, for logits.
    """
    if kind == "values":
        return mean(outputs)
    tensors = (_one_tensor(output, kind) for output in outputs)
    if kind == "probabilities":
        return mean(tensors)
    return mean_logits(tensors, dim) if kind == "logits" else mean_binary_logits(tensors)


def mean(outputs: Iterable[Any]) -> Any:
    r"""The mean :math:`\frac{1}{M} \sum_i y_i`, leaf by leaf where an output is a tuple, a list or a dictionary.

    Half precision is summed, and returned, in fp32. What cannot be averaged (integers, booleans, strings, ``None``)
    must be the same in all outputs, and is passed through.

    Raises:
        ValueError: If the outputs differ in structure, in a shape, or in a leaf that cannot be averaged.

    Example::

        >>> mean([{"y": torch.tensor([1.0]), "n": 3}, {"y": torch.tensor([2.0]), "n": 3}])
        {'y': tensor([1.5000]), 'n': 3}
    """
    sums: list[Any] = []
    first, count = None, 0
    for output in outputs:
        leaves, structure = tree_flatten(output)
        count += 1
        if first is None:
            first, sums = structure, [_wide(leaf) if _averages(leaf) else leaf for leaf in leaves]
        elif structure != first:
            raise ValueError(f"The members' outputs differ in structure: {first} and {structure}")
        else:
            sums = [_add(total, leaf) for total, leaf in zip(sums, leaves, strict=True)]
    if first is None:
        raise ValueError("There is no output to average")
    return tree_unflatten([leaf / count if _averages(leaf) else leaf for leaf in sums], first)


def log_mean_exp(values: Iterable[Tensor]) -> Tensor:
    r"""The logarithm of a mean, :math:`\log \frac{1}{M} \sum_i e^{v_i}`, which neither over- nor underflows.

    Args:
        values: Tensors of one shape, for instance log-probabilities; or one tensor whose first dimension is that of the
            members. Half precision is computed, and returned, in fp32: in fp16 ``softmax().mean().log()`` is ``-inf``
            wherever a probability is below 6e-8.

    Example::

        >>> log_mean_exp([torch.tensor([-1000.0]), torch.tensor([-1000.0])])
        tensor([-1000.])
    """
    total, count = _log_sum_exp(values)
    return total - math.log(count)


def mean_logits(logits: Iterable[Tensor], dim: int | None = None) -> Tensor:
    r"""The log of the mean probability, :math:`\log \frac{1}{M} \sum_i \mathrm{softmax}(z_i)`.

    It is normalized, so its softmax is the mean probability, and cross entropy on it is the mean's log loss.
    Log-softmax leaves what is normalized as it is: log-probabilities may be given.

    Args:
        logits: Tensors of one shape.
        dim: The dimension of the classes. ``None``: the last of one or two dimensions; with more it must be said, since
            ``[batch, class, …]`` and ``[batch, token, class]`` look alike.

    Raises:
        ValueError: If the classes' dimension is not said, or is one of a single class, whose probability is always one.

    Example::

        >>> mean_logits([torch.tensor([0.0, 0.0]), torch.tensor([9.0, 9.0])]).exp()
        tensor([0.5000, 0.5000])
    """
    return log_mean_exp(torch.log_softmax(_wide(z), _class_dim(z, dim)) for z in logits)


def mean_binary_logits(logits: Iterable[Tensor]) -> Tensor:
    r"""The logit of the mean probability, :math:`\log \sum_i \sigma(z_i) - \log \sum_i \sigma(-z_i)`.

    Both sums are kept as logarithms: ``logit(mean(sigmoid(z)))`` in fp32 is infinite from a logit of 17 on.

    Args:
        logits: Tensors of one shape; each element is a decision of its own.

    Example::

        >>> mean_binary_logits([torch.tensor([0.0, 30.0]), torch.tensor([0.0, 30.0])])
        tensor([ 0., 30.])
    """
    yes: Tensor | None = None
    no: Tensor | None = None
    for z in logits:
        for_it, against = logsigmoid(_wide(z)), logsigmoid(-_wide(z))
        if yes is None or no is None:
            yes, no = for_it, against
        else:
            _check_shapes(yes, for_it)
            yes, no = torch.logaddexp(yes, for_it), torch.logaddexp(no, against)
    if yes is None or no is None:
        raise ValueError("There is no output to average")
    return yes - no


def pairwise_disagreement(labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""How many of the ordered pairs of members disagree, summed over all positions, and how many pairs there are.

    :math:`M(M-1) - \sum_c n_c (n_c - 1)` at a position where :math:`n_c` members say ``c``. No pair is visited and the
    number of classes need not be known: after sorting, the k-th of a run of equal labels agrees with the k - 1 before.

    Args:
        labels: Integers of shape ``[M, …]``, the members first, at least two of them.

    Example::

        >>> pairwise_disagreement(torch.tensor([[0, 7], [0, 8], [1, 9]]))
        (tensor(10), tensor(12))
    """
    members = labels.shape[0]
    ordered = labels.sort(dim=0).values
    place = torch.arange(members, device=labels.device).view(-1, *[1] * (labels.ndim - 1))
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(begins, place, 0).cummax(dim=0).values
    agreeing = 2 * (place - start).sum()
    pairs = torch.tensor(members * (members - 1) * labels[0].numel(), device=labels.device)
    return pairs - agreeing, pairs


def mutual_information(log_probabilities: Tensor, dim: int = -1) -> Tensor:
    r"""What the members' disagreement adds to the entropy of the mean: :math:`\frac{1}{M}\sum_i KL(p_i \,\|\, \bar p)`.

    It equals :math:`H(\bar p) - \frac{1}{M} \sum_i H(p_i)`, the total minus the aleatoric uncertainty, and lies in
    ``[0, log M]``. In this form nothing cancels where the members nearly agree, which the difference of entropies does.

    Args:
        log_probabilities: Log-probabilities of shape ``[M, …]``, the members first. They are taken in fp64, where the
            device has it.
        dim: The dimension of the classes.

    Returns:
        One value for each position, not below zero.

    Example::

        >>> mutual_information(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log()).exp()
        tensor([2.], dtype=torch.float64)
    """
    wide = log_probabilities.to(torch.float32 if log_probabilities.device.type == "mps" else torch.float64)
    difference = wide - log_mean_exp(wide)
    # A class of probability zero adds nothing; 0 times infinity would be nan.
    terms = torch.where(wide == -math.inf, 0.0, wide.exp() * difference)
    return terms.sum(dim).mean(0).clamp_min(0.0)


def _log_sum_exp(values: Iterable[Tensor]) -> tuple[Tensor, int]:
    total: Tensor | None = None
    count = 0
    for value in values:
        wide = _wide(value)
        count += 1
        if total is None:
            total = wide
        else:
            _check_shapes(total, wide)
            total = torch.logaddexp(total, wide)
    if total is None:
        raise ValueError("There is no output to average")
    return total, count


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor))


def _averages(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _add(total: Any, leaf: Any) -> Any:
    if _averages(total) and _averages(leaf):
        _check_shapes(total, leaf)
        return total + leaf
    tensors = isinstance(total, Tensor) and isinstance(leaf, Tensor)
    if _averages(total) or _averages(leaf) or type(total) is not type(leaf):
        raise ValueError(_DIFFER)
    if tensors and _tracing():
        raise ValueError(
            "The members' outputs have a part that cannot be averaged (it is not a floating-point tensor) and must be"
            " the same of all members, which a traced program cannot see: use `torch.export`, or trace an ensemble of"
            " members that return the rest alone"
        )
    if tensors and _exporting():
        # An exported program does not branch on values: it asserts where it runs.
        _check_shapes(total, leaf)
        torch._assert_async((total == leaf).all(), _DIFFER)
    elif not (torch.equal(total, leaf) if tensors else total == leaf):
        raise ValueError(_DIFFER)
    return total


def _check_shapes(one: Tensor, other: Tensor) -> None:
    # Shapes that broadcast, such as [8] and [8, 1], would give something of a third shape.
    if _shape(one) != _shape(other):
        raise ValueError(f"The members' outputs differ in shape: {list(one.shape)} and {list(other.shape)}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    if not _tracing():
        return tuple(tensor.shape)
    with warnings.catch_warnings():  # while torch traces, sizes are tensors; that a check reads them changes nothing
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(map(int, tensor.shape))


def _tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call]


def _one_tensor(output: Any, kind: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"`outputs={kind!r}` is for members that return one tensor, and not {type(output).__name__}: name with `on`"
            f' the submodule that returns the {kind} alone. Only `outputs="values"` is combined leaf by leaf'
        )
    return output


def _class_dim(logits: Tensor, dim: int | None) -> int:
    if dim is None and logits.ndim > 2:
        raise ValueError(
            f"Of logits of shape {list(logits.shape)} it must be said where the classes are: `dim=1` for"
            " [batch, class, …], `dim=-1` for [batch, …, class]"
        )
    dim = -1 if dim is None else dim
    if _shape(logits)[dim] == 1:
        raise ValueError(
            f"Logits of shape {list(logits.shape)} have one class, whose probability is 1 whatever its logit is:"
            ' `outputs="binary_logits"` is for one logit a decision'
        )
    return dim
