"""Set dropout rates by layer and by schedule, and insert dropout into models without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_optim.base.arguments import check_number
from lightning_optim.base.construction import written
from lightning_optim.base.policy import belongs_to
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.regularization.dropout.masks import mask
from lightning_optim.regularization.dropout.sites import Site, find_sites
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import LightningModule, MisconfigurationException, Trainer


class ScheduledDropout(OptimCallback):
    r"""Set the dropout rates of a model by layer and by schedule, for the length of a fit.

    Inverted dropout: in training each element is multiplied by :math:`m / (1 - p)` with :math:`m \sim B(1 - p)`. It
    sets the rates of layers that have dropout: torch's dropout layers, attention, recurrent layers and
    :class:`DropPath`. With ``insert=True`` modules without dropout get it on their output, by a forward hook: it adds
    no keys to a checkpoint, and the model is as before after the fit. Scheduled rates are logged as
    ``regularization/dropout/<pattern>``.

    Early dropout, which is switched off after the first part of training, helps models that underfit; late dropout
    helps those that overfit: ``{"*": Piecewise({0.0: 0.1, 0.2: 0.0})}`` and ``{"*": Piecewise({0.0: 0.0, 0.2: 0.1})}``.
    Paper: Liu et al., `Dropout Reduces Underfitting <https://arxiv.org/abs/2303.01500>`_.

    Under ``torch.compile`` each new rate compiles the model again: use a schedule with few values, such as
    :class:`Piecewise`.

    Args:
        rates: A rate in [0, 1] for all modules, a number or a schedule; or a dictionary from a glob over module names
            to a rate. The first pattern that matches a module counts. ``0.2`` is short for ``{"*": 0.2}``.
        insert: True to add dropout to modules that have none: to every module that a glob matches and that has weights
            of its own with two dimensions or more, and to any module that a pattern names in full.
        name: Distinguishes two such callbacks in checkpoints.
        summary: See :class:`OptimCallback`.

    Raises:
        ValueError: If a rate is not in [0, 1], or if a pattern matches nothing (in ``on_fit_start``).

    Example::

        >>> from lightning_optim import Linear, ScheduledDropout
        >>> ScheduledDropout({"encoder.*": 0.1, "head.*": Linear(0.5, 0.0)}).rates["head.*"]
        Linear(0.5, 0.0)
        >>> ScheduledDropout(0.2, insert=True)
        ScheduledDropout(0.2, insert=True)

    For a Trainer: ``Trainer(callbacks=[ScheduledDropout({"head.*": 0.5})])``.
    """

    def __init__(
        self,
        rates: float | Schedule | dict[str, float | Schedule],
        insert: bool = False,
        name: str | None = None,
        summary: bool = True,
    ) -> None:
        super().__init__(name, summary)
        self.rates, self.insert = rates, insert
        _check(rates)
        self.reset()

    @property
    def _by_pattern(self) -> dict[str, float | Schedule]:
        return self.rates if isinstance(self.rates, dict) else {"*": self.rates}

    @property
    def needs_total(self) -> bool:
        return any(isinstance(rate, Schedule) and rate.scheduled for rate in self._by_pattern.values())

    def reset(self) -> None:
        self._setters: dict[str, list[Callable[[float], None]]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        for pattern, sites in find_sites(pl_module, self._by_pattern, self.insert).items():
            self._setters[pattern] = [self._setter(site) for site in sites]

    def describe_run(self) -> str:
        words = []
        for pattern, rate in self._by_pattern.items():
            count = len(self._setters[pattern])
            words.append(f"{written(rate)} on {pattern} ({count} layer{'' if count == 1 else 's'})")
        return f"dropout {', '.join(words)}"

    def _setter(self, site: Site) -> Callable[[float], None]:
        """Return a function that sets the rate of one layer until the end of the fit."""
        if site.attribute is None:
            inserted = _Inserted(site.name, self.draw)
            self.session.on_close(site.module.register_forward_hook(inserted).remove)
            return inserted.set_rate
        attribute, module = site.attribute, site.module
        self.session.patch(module, attribute, getattr(module, attribute))
        return lambda rate: setattr(module, attribute, rate)

    def draw(self, name: str, like: Tensor, rate: float) -> Tensor:
        """Draw the mask for the output of a module that has no dropout of its own; override it for other masks.

        Args:
            name: The name of the module.
            like: The output of the module.
            rate: The present rate, in (0, 1].

        Returns:
            The factors for ``like``: zeros and :math:`1 / (1 - rate)`.
        """
        return mask(like, rate)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = self.steps[0] if self.steps else 0
        logs = self.logs_now(trainer)
        for pattern, rate in self._by_pattern.items():
            now = value_at(rate, step, self.session.total)
            for set_rate in self._setters[pattern]:
                set_rate(now)
            if logs and isinstance(rate, Schedule):
                pl_module.log(f"regularization/dropout/{pattern}", now, on_step=True, on_epoch=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_setters": {}}


def _check(rates: Any) -> None:
    """Raise if the rates are neither one rate nor a dictionary of glob to rate."""
    one = isinstance(rates, int | float | Schedule)
    if not one and (not isinstance(rates, dict) or not rates or not all(isinstance(name, str) for name in rates)):
        raise ValueError(
            "`rates` must be a rate or a dictionary of glob to rate, such as {'encoder.*': 0.1}, got"
            f" {rates!r}{belongs_to(rates, Schedule)}"
        )
    for argument, rate in [("rates", rates)] if one else [(f"rates[{name!r}]", rates[name]) for name in rates]:
        check_number(argument, rate, low=0.0, high=1.0, schedule=True)


class _Inserted:
    """Drop elements of a module's output in training: a forward hook."""

    def __init__(self, name: str, draw: Callable[[str, Tensor, float], Tensor]) -> None:
        self.name, self.draw = name, draw
        self.rate = 0.0

    def set_rate(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not module.training or self.rate == 0.0:
            return output
        if not isinstance(output, Tensor):
            raise MisconfigurationException(
                f"ScheduledDropout(insert=True) drops elements of a tensor, and {self.name!r} returns"
                f" {type(output).__name__}: name a module inside it whose output is a tensor."
            )
        return output * self.draw(self.name, output, self.rate)
