"""Average all weights with equal shares."""

from __future__ import annotations

from lightning_optim.averaging.averages.average import Average


class SWA(Average):
    r"""Average all weights with equal shares (stochastic weight averaging): :math:`a \leftarrow a + (w - a) / (n + 1)`.

    Take in the weights rarely and late, at the end of each epoch of the last quarter of the run, with a learning rate
    that stays high (Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*,
    `arXiv:1803.05407 <https://arxiv.org/abs/1803.05407>`_). Running statistics of BatchNorm belong to other weights
    then and are estimated anew: without that, accuracy breaks down.

    Example::

        >>> swa = SWA()
        >>> for step in (1, 2, 3):
        ...     swa.update_([torch.tensor([float(step)])], step=step)
        >>> swa.averaged
        [tensor([2.])]
        >>> callback = WeightAveraging(SWA(), start=0.75, every="epoch")  # for Trainer(callbacks=[callback])
    """

    def _share(self, step: int) -> float:
        return 1.0 / (self._counters["updates"] + 1)
