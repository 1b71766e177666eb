"""Set dropout rates by layer and by schedule, and insert dropout into models without it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from lightning_optim.base.arguments import check_choice, check_number
from lightning_optim.base.construction import written
from lightning_optim.base.policy import belongs_to, is_scheduled
from lightning_optim.base.schedules import Schedule
from lightning_optim.regularization.dropout.masks import block_mask, mask
from lightning_optim.regularization.dropout.places import PatternRates, open_place
from lightning_optim.regularization.dropout.sites import Insert, find_sites
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import LightningModule, Trainer
from lightning_optim.runtime.lightning.modules import compile_again, is_wrapped_to_compile
from lightning_optim.runtime.lightning.torch_internals import is_compiled

_MOST_NAMED = 8  # modules in the report
_OF = {False: "", True: "", "block": " of blocks", "weight": " of weights"}


class ScheduledDropout(OptimCallback):
    r"""Set the dropout rates of a model by layer and by schedule, for the length of a fit.

    Inverted dropout: in training each element is multiplied by :math:`m / (1 - p)` with :math:`m \sim B(1 - p)`. It
    sets the rates of layers that have dropout: torch's dropout layers, attention, recurrent layers, and modules with a
    ``drop_prob``, as :class:`DropPath`, :class:`DropBlock`, :class:`WeightDrop` and those of timm have it. With
    ``insert=True`` modules without dropout get it on their output, by a forward hook. It adds no keys to a checkpoint,
    and the model is as before after the fit. Scheduled rates are logged as ``regularization/dropout/<pattern>``;
    :meth:`rates_by_module` says which module has which rate. Layers that are new in the model, such as another head,
    are found at the first batch of the next epoch.

    Early dropout, which is switched off after the first part of training, helps models that underfit; late dropout
    helps those that overfit: ``{"*": Piecewise({0.0: 0.1, 0.2: 0.0})}`` and ``{"*": Piecewise({0.0: 0.0, 0.2: 0.1})}``.
    Paper: Liu et al., `Dropout Reduces Underfitting <https://arxiv.org/abs/2303.01500>`_.

    In a compiled module (``torch.compile(module)``, ``module.compile()``) a schedule does not compile it again: torch's
    dropout layers, drop-path modules and what is inserted read their rate from a tensor, and so draw other random
    numbers than they do uncompiled. Attention, recurrent layers and dropout classes of your own take a number, and each
    new number compiles the module again: there a schedule with more than seven values is rounded to seven.

    Args:
        rates: A rate in [0, 1] for all modules, a number or a schedule; or a dictionary from a glob over module names
            to a rate. The first pattern that matches a module counts. ``0.2`` is short for ``{"*": 0.2}``.
        insert: True to add dropout to modules that have none: to every module that a glob matches and that has weights
            of its own with two dimensions or more, and to any module that a pattern names in full. A glob leaves out
            the model's last layer, whose outputs are the predictions, unless it matches nothing else. The last is that
            in the order of ``named_modules()``. ``"block"`` adds :class:`DropBlock` instead, with a glob after
            convolutions of two dimensions; ``"weight"`` drops weights as :class:`WeightDrop` does, in all layers that
            are matched, recurrent ones too, whose dropout between layers then stays as it is.
        block_size: Side of the squares of ``insert="block"``. Default 7, as in :class:`DropBlock`.
        name: Distinguishes two such callbacks in checkpoints.
        summary: See :class:`OptimCallback`.

    Raises:
        ValueError: If a rate is not in [0, 1], another argument is not one of those above, or a pattern matches
            nothing (in ``on_fit_start``).
        MisconfigurationException: If an output that is to be dropped is no tensor, or for blocks no feature map.

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
        insert: Insert = False,
        block_size: int = 7,
        name: str | None = None,
        summary: bool = True,
    ) -> None:
        super().__init__(name, summary)
        _check(rates)
        check_choice("insert", insert, Literal[True, False, "block", "weight"])
        check_number("block_size", block_size, low=1, integer=True)
        self.rates, self.insert, self.block_size = rates, insert, block_size
        self.reset()

    @property
    def _by_pattern(self) -> dict[str, float | Schedule]:
        return self.rates if isinstance(self.rates, dict) else {"*": self.rates}

    @property
    def needs_total(self) -> bool:
        return is_scheduled(self.rates)

    def reset(self) -> None:
        self._patterns: dict[str, PatternRates] = {}
        self._rates: dict[str, float] = {}  # of a fit that is over

    def rates_by_module(self) -> dict[str, float]:
        """Return the present rate of each module whose rate is set, by its name; after a fit, the rates at its end."""
        if not self._patterns:
            return dict(self._rates)
        return {place.name: place.rate for pattern in self._patterns.values() for place in pattern.places}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.session.on_close(self._leave_places)
        if self.insert:
            self.session.on_close(partial(compile_again, pl_module))
        self._patterns = {pattern: PatternRates(rate) for pattern, rate in self._by_pattern.items()}
        self._find_places(pl_module, strict=True)

    def _find_places(self, pl_module: LightningModule, strict: bool) -> None:
        """Prepare the places of the model that are not known yet, and forget those that are no longer in it."""
        compiled, existing = _in_compiled_modules(pl_module), {id(module) for module in pl_module.modules()}
        known: set[int] = set()
        for pattern in self._patterns.values():
            pattern.places = [place for place in pattern.places if id(place.module) in existing]
            known |= {id(place.module) for place in pattern.places}
        for name, found in find_sites(pl_module, self._by_pattern, self.insert, strict).items():
            pattern, new = self._patterns[name], [site for site in found.sites if id(site.module) not in known]
            pattern.left_out = found.left_out
            places = []
            for site in new:
                in_tensor = pattern.moves and id(site.module) in compiled
                rate = pattern.tensor_on(pl_module.device) if in_tensor else None
                places.append(open_place(site, self.session, self.insert, self.draw, rate))
            pattern.add(places)
            if any(site.attribute is None for site in new):
                compile_again(pl_module)

    def _leave_places(self) -> None:
        self._rates, self._patterns = self.rates_by_module(), {}

    def describe_run(self) -> str:
        words = []
        for name, pattern in self._patterns.items():
            count = len(pattern.places)
            without = f", without {pattern.left_out}" if pattern.left_out else ""
            words.append(f"{written(pattern.rate)} on {name} ({count} layer{'' if count == 1 else 's'}{without})")
        return f"dropout{_OF[self.insert]} {', '.join(words)}"

    def report(self) -> str:
        rates = [f"{name} {rate:.3g}" for name, rate in self.rates_by_module().items()]
        more = f", … and {len(rates) - _MOST_NAMED} more" if len(rates) > _MOST_NAMED else ""
        return f"dropout at the end: {', '.join(rates[:_MOST_NAMED])}{more}"

    def draw(self, name: str, like: Tensor, rate: float | Tensor) -> Tensor:
        """Draw the factors for a module that has no dropout of its own; override it for other masks.

        Args:
            name: The name of the module, or with ``insert="weight"`` of its weight.
            like: The output of the module, or its weight.
            rate: The present rate, in (0, 1]. For a schedule in a compiled module, a tensor without dimensions that
                holds it: what is drawn at 0 is not used.

        Returns:
            The factors for ``like``: zeros and :math:`1 / (1 - rate)`.
        """
        return block_mask(like, rate, self.block_size) if self.insert == "block" else mask(like, rate)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # a layer that was replaced, such as a new head
            self._find_places(pl_module, strict=False)
        step = self.steps[0] if self.steps else 0
        logs = self.logs_now(trainer)
        for name, pattern in self._patterns.items():
            now = pattern.set_rate(step, self.session.total)
            if logs and isinstance(pattern.rate, Schedule):
                pl_module.log(f"regularization/dropout/{name}", now, on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for pattern in self._patterns.values():
            pattern.rest()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_patterns": {}, "_rates": self.rates_by_module()}


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


def _in_compiled_modules(pl_module: nn.Module) -> set[int]:
    """Return the ids of the modules that are compiled, or are within a module that is."""
    if is_wrapped_to_compile(pl_module):
        return {id(module) for module in pl_module.modules()}
    return {id(inner) for outer in pl_module.modules() if is_compiled(outer) for inner in outer.modules()}
