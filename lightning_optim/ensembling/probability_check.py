"""Check that values are probabilities where a user says that they are."""

from __future__ import annotations

from torch import Tensor

_TOLERANCE = 0.02  # for probabilities in bf16, each rounded to 1 part in 256


def why_no_probabilities(values: Tensor, dim: int | None = None) -> str:
    """Return why values cannot be probabilities, as words that follow "they"; empty if they can, or are NaN.

    Args:
        values: Floating-point numbers.
        dim: The dimension of classes that exclude each other. Default ``None``: it is not known whether any exclude
            each other, so that each element may be a probability of its own, of a binary or multilabel decision.

    Example::

        >>> why_no_probabilities(torch.tensor([[0.9, 0.8]])), why_no_probabilities(torch.tensor([[0.9, 0.8]]), dim=1)
        ('', 'do not add up to 1 over the classes, dimension 1')
        >>> why_no_probabilities(torch.tensor([-3.0, 2.0]))
        'range from -3 to 2'
    """
    if ((values < -_TOLERANCE) | (values > 1.0 + _TOLERANCE)).any():
        return f"range from {float(values.min()):.4g} to {float(values.max()):.4g}"
    if dim is not None and ((values.sum(dim) - 1.0).abs() > _TOLERANCE).any():
        return f"do not add up to 1 over the classes, dimension {dim}"
    return ""
