"""Reference formulas of stopping criteria, one score at a time; smaller scores are better."""

from __future__ import annotations

import math
from collections.abc import Callable

from tests.harness.reference_loop import Formula, Weights


class Rule:
    """Read one score at a time; ``stops`` and ``best`` describe the last one."""

    stops = False
    best = False

    def read(self, score: float) -> None:
        raise NotImplementedError


class Patience(Rule):
    """Stop after ``patience`` scores that are not below the lowest one before them."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.lowest = math.inf
        self.waited = 0

    def read(self, score: float) -> None:
        self.best = score < self.lowest
        self.lowest = min(self.lowest, score) if self.best else self.lowest
        self.waited = 0 if self.best else self.waited + 1
        self.stops = self.waited >= self.patience


class Below(Rule):
    """Stop at a score below ``value``; the first such score is the best."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.lowest = math.inf

    def read(self, score: float) -> None:
        self.stops = score < self.value
        self.best = self.stops and score < self.lowest
        self.lowest = score if self.best else self.lowest


class Matching(Rule):
    """Stop at a score for which ``condition`` is true; no score is the best."""

    def __init__(self, condition: Callable[[float], bool]) -> None:
        self.condition = condition

    def read(self, score: float) -> None:
        self.stops = self.condition(score)


class Enough(Rule):
    """Stop when ``count`` of several rules stop; each rule reads every score."""

    def __init__(self, count: int, *rules: Rule) -> None:
        self.count = count
        self.rules = rules

    def read(self, score: float) -> None:
        for rule in self.rules:
            rule.read(score)
        self.stops = sum(rule.stops for rule in self.rules) >= self.count
        self.best = any(rule.best for rule in self.rules)


class First(Rule):
    """Stop at the first rule that stops; later rules do not read that score."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules

    def read(self, score: float) -> None:
        self.stops = self.best = False
        for rule in self.rules:
            rule.read(score)
            self.best = self.best or rule.best
            if rule.stops:
                self.stops = True
                return


class StopBy(Formula):
    """End the run when a rule stops, with the best weights if there are any."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.kept: Weights = {}

    def stop(self, score: float, weights: Weights) -> bool:
        self.rule.read(score)
        if self.rule.best:
            self.kept = {name: weight.clone() for name, weight in weights.items()}
        return self.rule.stops

    def final(self, weights: Weights) -> Weights:
        return self.kept or weights


class Stop(Formula):
    """Stop when the score was not below its best for ``patience`` validations, and end with the best weights."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = math.inf
        self.waited = 0
        self.kept: Weights = {}

    def stop(self, score: float, weights: Weights) -> bool:
        self.waited += 1
        if score < self.best:
            self.best, self.waited = score, 0
            self.kept = {name: weight.clone() for name, weight in weights.items()}
        return self.waited >= self.patience

    def final(self, weights: Weights) -> Weights:
        return self.kept or weights
