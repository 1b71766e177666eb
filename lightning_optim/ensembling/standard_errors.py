"""Estimate how uncertain the curve of ``cost_benefit`` is, though the groups of members overlap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def standard_errors(measured: Sequence[tuple[Sequence[tuple[int, ...]], Sequence[float]]]) -> list[float]:
    r"""Return the standard error of the mean over groups, for each number of members, over the choice of members.

    Groups of :math:`k` out of :math:`M` members overlap, the more the larger :math:`k` is: the range or the standard
    deviation over them shrinks to zero at :math:`k = M`, however uncertain the values are. So the overlap is put into
    the formula. With :math:`o_{ij}` the share of members that the groups :math:`i` and :math:`j` have in common, and to
    first order in the members' deviations,

    .. math::
        \operatorname{Cov}(v_i, v_j) = o_{ij} \sigma_k^2, \qquad
        \operatorname{E} s^2 = \frac{G}{G - 1} (1 - \bar o)\, \sigma_k^2, \qquad
        \mathrm{error}_k = \sqrt{\bar o}\, \hat\sigma_k
        = s \sqrt{\frac{G - 1}{G} \frac{\bar o}{1 - \bar o}},

    with the sample variance :math:`s^2` of the :math:`G` values, and the mean :math:`\bar o` over all pairs of groups.
    For one member this is :math:`s / \sqrt M`. All members have one group and no :math:`s`; then
    :math:`\hat\sigma_M^2 = \hat\sigma_{M-1}^2 (M - 1) / M`, which is the jackknife of the :math:`M` groups that leave
    one member out. A metric is not linear in its members, and then the estimate is rather too large, like other
    jackknives: by up to a third for a loss, and up to twice for a metric with steps, such as accuracy.

    Args:
        measured: The groups and their values, for 1, 2, … members.

    Returns:
        An error for each number of members, NaN where no two groups can be compared.

    Example::

        >>> standard_errors([([(0,), (1,), (2,)], [1.0, 2.0, 3.0]), ([(0, 1), (1, 2), (2, 0)], [1.5, 2.5, 2.0])])
        [0.577..., 0.577...]
    """
    errors, variance = [], math.nan
    for size, (groups, values) in enumerate(measured, 1):
        overlap = _mean_overlap(groups)
        if len(groups) > 1:
            mean = statistics.fmean(values)
            variance = statistics.fmean((value - mean) * (value - mean) for value in values) / (1.0 - overlap)
        else:
            variance *= (size - 1) / size
        errors.append(math.sqrt(variance * overlap))
    return errors


def _mean_overlap(groups: Sequence[tuple[int, ...]]) -> float:
    """Return the mean share of members that two groups have in common, each group paired with itself too."""
    shares = [len({*one} & {*other}) / len(one) for one in groups for other in groups]
    return statistics.fmean(shares)
