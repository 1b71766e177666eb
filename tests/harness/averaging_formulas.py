"""Reference formulas of weight averages: sums over a stored history, one tensor at a time."""

from __future__ import annotations

from tests.harness.reference_loop import Formula, Step, Weights


class Average(Formula):
    """Update ``average += (1 - d) * (w - average)`` with ``d = min(decay, 1 - (1 + t)^(-2/3))^every``.

    ``t`` counts the steps since the first update, so that the first update copies.
    """

    def __init__(self, decay: float, every: int = 1) -> None:
        self.decay = decay
        self.every = every
        self.average: Weights = {}

    def after_step(self, step: Step) -> None:
        if step.step % self.every:
            return
        decay = min(self.decay, 1.0 - (1.0 + step.step) ** (-2.0 / 3.0)) ** self.every
        for name, weight in zip(step.names, step.weights, strict=True):
            before = self.average.get(name, weight)
            self.average[name] = before + (1.0 - decay) * (weight - before)

    def evaluated(self, weights: Weights) -> Weights:
        return self.average or weights

    def final(self, weights: Weights) -> Weights:
        return self.evaluated(weights)


class Mean(Formula):
    """Average the weights after each step, or after the last ``size`` steps.

    Args:
        start: Number of steps at the beginning that are left out.
        size: Number of steps in the mean; default: all.
        by_epoch: If True, average the weights at the end of each epoch instead.
    """

    def __init__(self, start: int = 0, size: int | None = None, by_epoch: bool = False) -> None:
        self.start = start
        self.size = size
        self.by_epoch = by_epoch
        self.history: dict[str, list] = {}

    def after_step(self, step: Step) -> None:
        if step.step >= self.start and not self.by_epoch:
            for name, weight in zip(step.names, step.weights, strict=True):
                self.history.setdefault(name, []).append(weight.clone())

    def after_epoch(self, weights: Weights) -> None:
        if self.by_epoch:
            for name, weight in weights.items():
                self.history.setdefault(name, []).append(weight.clone())

    def evaluated(self, weights: Weights) -> Weights:
        if not self.history:
            return weights
        averaged = {}
        for name, weight in weights.items():
            counted = self.history[name][-self.size :] if self.size else self.history[name]
            averaged[name] = (sum(w.double() for w in counted) / len(counted)).to(weight.dtype)
        return averaged

    def final(self, weights: Weights) -> Weights:
        return self.evaluated(weights)


class Constant(Formula):
    """Update ``average = decay^every * average + (1 - decay^every) * weight``, without a warm-up."""

    def __init__(self, decay: float, every: int) -> None:
        self.decay = decay**every
        self.every = every
        self.average: Weights = {}

    def after_step(self, step: Step) -> None:
        if step.step % self.every == 0:
            for name, weight in zip(step.names, step.weights, strict=True):
                before = self.average.get(name, weight)
                self.average[name] = self.decay * before + (1.0 - self.decay) * weight

    def evaluated(self, weights: Weights) -> Weights:
        return self.average or weights

    def final(self, weights: Weights) -> Weights:
        return self.evaluated(weights)


class BestMean(Formula):
    """Average, after the run, the weights of the best validations, and keep the mean if its score beats the best."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.seen: list[tuple[float, Weights]] = []
        self.better = False

    def stop(self, score: float, weights: Weights) -> bool:
        self.seen.append((score, {name: weight.clone() for name, weight in weights.items()}))
        return False

    @property
    def best(self) -> list[tuple[float, Weights]]:
        return sorted(self.seen, key=lambda pair: pair[0])[: self.top]

    def candidate(self) -> Weights:
        names = self.best[0][1]
        return {name: sum(weights[name] for _, weights in self.best) / self.top for name in names}

    def judge(self, score: float) -> None:
        self.better = score < self.best[0][0]

    def final(self, weights: Weights) -> Weights:
        return self.candidate() if self.better else self.best[0][1]
