"""Set the rate of a place of a model until a fit ends: an attribute, dropped outputs, or dropped weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.base.policy import is_scheduled
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.regularization.dropout.compiled_rates import forward_at, levels, rate_tensor
from lightning_optim.regularization.dropout.sites import Insert, Site
from lightning_optim.regularization.dropout.weight_drop import call_with_dropped
from lightning_optim.runtime.lightning import MisconfigurationException
from lightning_optim.runtime.session import Session

Draw = Callable[[str, Tensor, "float | Tensor"], Tensor]


class Place:
    """Set the rate of one place.

    Args:
        site: The place.
        write: Writes a number where the place holds its rate.
        rounds: True if each new number compiles the module again, so that only few may come.
        rate: The rate before the first batch.

    Attributes:
        rate: The present rate in training.
    """

    def __init__(self, site: Site, write: Callable[[float], None], rounds: bool, rate: float = 0.0) -> None:
        self.name, self.module, self.write, self.rounds = site.name, site.module, write, rounds
        self.rate = self.own = rate

    def set_rate(self, rate: float) -> None:
        self.rate = rate
        self.write(rate)


class PatternRates:
    """Set the rates of the places of a pattern.

    Args:
        rate: A number, or a schedule.

    Attributes:
        places: The places; each is in the model.
        left_out: The name of the model's last layer, if the pattern matches it and does not take it; else "".
        tensor: What places in compiled modules read, once there are any.
    """

    def __init__(self, rate: float | Schedule) -> None:
        self.rate = rate
        self.moves = is_scheduled(rate)
        self.places: list[Place] = []
        self.left_out = ""
        self.tensor: Tensor | None = None
        self._now: float | None = None
        self._levels: list[float] | None = None

    def add(self, places: list[Place]) -> None:
        self.places, self._now = self.places + places, None

    def tensor_on(self, device: torch.device) -> Tensor:
        """Return the tensor that compiled modules read; made at the first call."""
        if self.tensor is None:
            self.tensor = rate_tensor(device)
        return self.tensor

    def set_rate(self, step: int, total: float) -> float:
        """Set the rate of all places to that of an optimizer step, and return it."""
        now = value_at(self.rate, step, total)
        if now != self._now:
            self._now = now
            if self.tensor is not None:
                self.tensor.fill_(now)
            for place in self.places:
                place.set_rate(self._rounded(now, total) if place.rounds else now)
        return now

    def rest(self) -> None:
        """Set rates that compile a module again to those before the fit: one program serves all evaluations."""
        self._now = None
        for place in self.places:
            if place.rounds:
                place.write(place.own)

    def _rounded(self, rate: float, total: float) -> float:
        if self._levels is None:
            assert isinstance(self.rate, Schedule)
            self._levels = levels(self.rate, total)
        return min(self._levels, key=lambda level: abs(level - rate))


def open_place(site: Site, session: Session, insert: Insert, draw: Draw, rate: Tensor | None) -> Place:
    """Prepare a place for the length of a fit.

    Args:
        site: The place.
        session: The fit, at whose end all is undone.
        insert: What is inserted where there is no dropout.
        draw: Draws the factors of what is inserted.
        rate: Where the module is compiled, the tensor from which it is to read its rate; else ``None``.
    """
    if site.attribute is None:
        inserted = _InsertedWeights(site, draw, rate) if insert == "weight" else _Inserted(site, insert, draw, rate)
        inserted.install(session)
        return Place(site, inserted.set_rate, rounds=False)
    attribute, module = site.attribute, site.module
    own = getattr(module, attribute)
    session.patch(module, attribute, own)
    forward = None if rate is None else forward_at(module, rate)
    if forward is not None:
        session.patch(module, "forward", forward)
    rounds = rate is not None and forward is None
    return Place(site, lambda number: setattr(module, attribute, number), rounds, own)


class _Inserted:
    """Drop elements or blocks of a module's output in training: a forward hook."""

    def __init__(self, site: Site, insert: Insert, draw: Draw, tensor: Tensor | None) -> None:
        self.name, self.module, self.insert, self.draw, self.tensor = site.name, site.module, insert, draw, tensor
        self.rate = 0.0

    def install(self, session: Session) -> None:
        session.on_close(self.module.register_forward_hook(self).remove)

    def set_rate(self, rate: float) -> None:
        if self.tensor is None:  # a compiled module may not meet a new number
            self.rate = rate

    def factors(self, name: str, like: Tensor) -> Tensor:
        """Return the factors of a tensor: ones at a rate of 0, as without dropout."""
        if self.tensor is None:
            return self.draw(name, like, self.rate)
        rate = self.tensor.to(like.device)
        return torch.where(rate > 0.0, self.draw(name, like, rate), 1.0)

    @property
    def is_off(self) -> bool:
        return not self.module.training or (self.tensor is None and self.rate == 0.0)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.is_off:
            return output
        if not isinstance(output, Tensor):
            raise MisconfigurationException(
                f"ScheduledDropout(insert={self.insert!r}) drops elements of a tensor, and {self.name!r} returns"
                f" {type(output).__name__}: name a module inside it whose output is a tensor."
            )
        if self.insert == "block" and output.ndim != 4:
            raise MisconfigurationException(
                f"ScheduledDropout(insert='block') drops squares of feature maps [N, C, H, W], and {self.name!r}"
                f" returns {list(output.shape)}: name modules with such an output, or pass `insert=True`."
            )
        return output * self.factors(self.name, output)


class _InsertedWeights(_Inserted):
    """Drop weights of a module in training: in the place of its ``forward``."""

    def __init__(self, site: Site, draw: Draw, tensor: Tensor | None) -> None:
        super().__init__(site, "weight", draw, tensor)

    def install(self, session: Session) -> None:
        original = self.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.is_off:
                return original(*args, **kwargs)
            return call_with_dropped(self.module, original, self._draw, args, kwargs)

        session.patch(self.module, "forward", forward)

    def _draw(self, name: str, weight: Tensor) -> Tensor:
        return self.factors(f"{self.name}.{name}", weight)
