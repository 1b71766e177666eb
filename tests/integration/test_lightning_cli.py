"""`LightningCLI` builds from YAML the callbacks that Python builds: those of each entry, and other forms of them."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import yaml

import lightning_optim
from lightning_optim import (
    EMA,
    L1,
    L2,
    AnyOf,
    AtLeast,
    ClipByNorm,
    ClipByValue,
    Cosine,
    EarlyStopping,
    GradientAccumulation,
    GradientClipping,
    Linear,
    OptimCallback,
    Piecewise,
    Plateau,
    Policy,
    ScheduledDropout,
    StochasticWeightAveraging,
    Threshold,
    WeightAveraging,
    WeightRegularization,
)
from tests.integration.entry_fits import CELL, assert_same, each_entry, fit
from tests.lightning import BoringModel, Callback, LightningCLI
from tests.registry import Entry


def made(entry: Entry) -> tuple[list[Callback], dict[int, dict[str, Any]]]:
    """Return the callbacks of an entry, and the arguments that each was made with."""
    calls: dict[int, dict[str, Any]] = {}

    def recording(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **options: Any) -> None:
            bound = inspect.signature(original).bind(self, *args, **options).arguments
            calls.setdefault(id(self), {name: value for name, value in bound.items() if name != "self"})
            original(self, *args, **options)

        return __init__

    with pytest.MonkeyPatch.context() as patch:
        for cls in _all_subclasses(OptimCallback):
            if "__init__" in vars(cls):
                patch.setattr(cls, "__init__", recording(cls.__init__))
        return entry.all_callbacks(CELL), calls


def _all_subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_all_subclasses(sub) for sub in cls.__subclasses__()))


def as_yaml(value: Any, calls: dict[int, dict[str, Any]]) -> Any:
    """Return a value as a user writes it in YAML: policies by their class name, callbacks with their module."""
    if isinstance(value, Policy):
        named = [one for one in inspect.signature(type(value)).parameters.values() if one.kind != one.VAR_POSITIONAL]
        arguments = {one.name: getattr(value, one.name) for one in named}
        return {"class_path": type(value).__name__, "init_args": as_yaml(arguments, calls)}
    if isinstance(value, OptimCallback):
        cls = type(value)
        where = "lightning_optim" if hasattr(lightning_optim, cls.__name__) else cls.__module__
        return {"class_path": f"{where}.{cls.__name__}", "init_args": as_yaml(calls.get(id(value), {}), calls)}
    if isinstance(value, dict):
        return {key: as_yaml(item, calls) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_yaml(item, calls) for item in value]
    return f"{value.__module__}.{value.__name__}" if isinstance(value, FunctionType) else value


def from_yaml(text: str, folder: Path) -> list[Callback]:
    """Return our callbacks in a Trainer that `LightningCLI` has made."""
    path = folder / "config.yaml"
    indented = textwrap.indent(textwrap.dedent(text), "    ")
    path.write_text(f"seed_everything: false\ntrainer:\n  accelerator: cpu\n  logger: false\n  callbacks:\n{indented}")
    cli = LightningCLI(BoringModel, run=False, args=["--config", str(path)], save_config_callback=None)
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, OptimCallback)]


@each_entry
def test_entry(entry: Entry, tmp_path: Path) -> None:
    callbacks, calls = made(entry)
    built = from_yaml(yaml.safe_dump(as_yaml(callbacks, calls), sort_keys=False), tmp_path)
    assert [described(callback) for callback in built] == [described(callback) for callback in callbacks]
    twins = [type(callback)(**calls.get(id(callback), {})) for callback in callbacks]
    fits = []
    for some in (built, twins):
        torch.manual_seed(0)
        fits.append(fit(entry, callbacks=some))
    assert_same(*fits)


def described(callback: Callback) -> dict[str, str]:
    """Return the class and the public attributes of a callback as text."""
    public = {name: arguments(value) for name, value in vars(callback).items() if not name.startswith("_")}
    return {"class": type(callback).__name__} | {name: text for name, text in public.items() if " at 0x" not in text}


def arguments(value: Any) -> str:
    """Return a value as text, with all arguments of a policy. YAML passes the defaults too, and they are printed."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(arguments, value))}]"
    if isinstance(value, dict):
        return str({key: arguments(held) for key, held in value.items()})
    if isinstance(value, Policy):
        public = {name: arguments(held) for name, held in vars(value).items() if not name.startswith("_")}
        return f"{type(value).__name__}{public}"
    return f"{value.__module__}.{value.__name__}" if isinstance(value, FunctionType) else repr(value)


def count_tokens(batch):  # type: ignore[no-untyped-def]  # as most functions of a user are
    return (batch != 0).sum()


def midpoint(averaged, weight, count):  # type: ignore[no-untyped-def]
    return (averaged + weight) / 2


def count_samples(batch: Any) -> int:
    return len(batch)


class TokenCount:
    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, batch: Any) -> int:
        return int((batch != self.padding).sum())

    def __repr__(self) -> str:
        return f"TokenCount({self.padding})"


OTHER_FORMS = {
    "a number for a policy": ("[{class_path: GradientClipping, init_args: {policy: 1}}]", GradientClipping(1.0)),
    "one policy, no list": (
        """
        - class_path: lightning_optim.WeightRegularization
          init_args: {terms: {class_path: L2, init_args: {strength: 1e-4}}}
        """,
        WeightRegularization(L2(1e-4)),
    ),
    "a schedule for a number": (
        """
        - class_path: WeightRegularization
          init_args:
            terms:
              - class_path: L1
                init_args:
                  strength: {class_path: Linear, init_args: {start: 0.1, end: 0.0}}
                  "on": [net.*, head.*]
              - {class_path: lightning_optim.L2, init_args: {strength: 0.5, exclude: net.0.*}}
        """,
        WeightRegularization([L1(Linear(0.1, 0.0), on=["net.*", "head.*"]), L2(0.5, exclude="net.0.*")]),
    ),
    "schedules in a list of policies": (
        """
        - class_path: GradientClipping
          init_args:
            policy:
              - class_path: ClipByNorm
                init_args:
                  max_norm: {class_path: Cosine, init_args: {start: 5.0, end: 1.0, until: 0.5}}
                  norm_type: .inf
              - class_path: ClipByValue
                init_args: {value: {class_path: Piecewise, init_args: {values: {0: 0.1, 0.5: 0.01}}}}
        """,
        GradientClipping(
            [
                ClipByNorm(Cosine(5.0, 1.0, until=0.5), norm_type=float("inf")),
                ClipByValue(Piecewise({0: 0.1, 0.5: 0.01})),
            ]
        ),
    ),
    "bounds by patterns": (
        """
        - class_path: GradientClipping
          init_args:
            policy:
              encoder.*: 1
              head.*: {class_path: ClipByValue, init_args: {value: 0.1}}
              "*": [0.5, {class_path: ClipByValue, init_args: {value: 0.5}}]
        """,
        GradientClipping({"encoder.*": 1.0, "head.*": ClipByValue(0.1), "*": [0.5, ClipByValue(0.5)]}),
    ),
    "bounds by optimizers": (
        """
        - class_path: GradientClipping
          init_args:
            policy:
              0: 1.0
              1: {class_path: ClipByValue, init_args: {value: 0.1}}
              2: [{class_path: ClipByValue, init_args: {value: 0.1}}, 0.5]
        """,
        GradientClipping({0: 1.0, 1: ClipByValue(0.1), 2: [ClipByValue(0.1), 0.5]}),
    ),
    "epochs": (
        "[{class_path: GradientAccumulation, init_args: {n: {0: 8, 10: 4}}}]",
        GradientAccumulation({0: 8, 10: 4}),
    ),
    "a function that weighs batches": (
        f"[{{class_path: GradientAccumulation, init_args: {{n: 4, weight_by: {__name__}.count_tokens}}}}]",
        GradientAccumulation(4, weight_by=count_tokens),
    ),
    "an annotated function that weighs batches": (
        f"[{{class_path: GradientAccumulation, init_args: {{n: 4, weight_by: {__name__}.count_samples}}}}]",
        GradientAccumulation(4, weight_by=count_samples),
    ),
    "a callable class that weighs batches": (
        f"""
        - class_path: GradientAccumulation
          init_args:
            n: 4
            weight_by: {{class_path: {__name__}.TokenCount, init_args: {{padding: 3}}}}
        """,
        GradientAccumulation(4, weight_by=TokenCount(padding=3)),
    ),
    "a function that averages": (
        f"""
        - class_path: lightning_optim.StochasticWeightAveraging
          init_args: {{avg_fn: {__name__}.midpoint}}
        """,
        StochasticWeightAveraging(avg_fn=midpoint),
    ),
    "a criterion of criteria": (
        """
        - class_path: lightning_optim.EarlyStopping
          init_args:
            monitor:
              class_path: AnyOf
              init_args:
                criteria:
                  - {class_path: Plateau, init_args: {monitor: val_loss, patience: 5}}
                  - {class_path: Threshold, init_args: {monitor: val_loss, value: 0.1}}
            dirpath: best
        """,
        EarlyStopping(AnyOf([Plateau("val_loss", patience=5), Threshold("val_loss", 0.1)]), dirpath="best"),
    ),
    "one rate of dropout": (
        "[{class_path: ScheduledDropout, init_args: {rates: 0.2, insert: true}}]",
        ScheduledDropout(0.2, insert=True),
    ),
    "a schedule of dropout": (
        """
        - class_path: ScheduledDropout
          init_args: {rates: {class_path: Linear, init_args: {start: 0.1, end: 0.5}}}
        """,
        ScheduledDropout(Linear(0.1, 0.5)),
    ),
    "rates of dropout": (
        """
        - class_path: ScheduledDropout
          init_args:
            rates:
              encoder.*: 0.1
              head.*: {class_path: Linear, init_args: {start: 0.1, end: 0.5}}
        """,
        ScheduledDropout({"encoder.*": 0.1, "head.*": Linear(0.1, 0.5)}),
    ),
    "an infinite patience": (
        "[{class_path: lightning_optim.EarlyStopping, init_args: {monitor: val_loss, patience: .inf}}]",
        EarlyStopping("val_loss", patience=float("inf")),
    ),
    "at least one of two criteria": (
        """
        - class_path: lightning_optim.EarlyStopping
          init_args:
            monitor:
              class_path: AtLeast
              init_args:
                k: 1
                criteria:
                  - {class_path: Plateau, init_args: {monitor: val_loss}}
                  - {class_path: Threshold, init_args: {monitor: val_loss, value: 0.1}}
        """,
        EarlyStopping(AtLeast(1, Plateau("val_loss"), Threshold("val_loss", 0.1))),
    ),
    "a weighted sum of metrics": (
        """
        - class_path: lightning_optim.EarlyStopping
          init_args: {monitor: a, mode: max, best_by: {a: 1.0, b: 0.5}, name: x}
        """,
        EarlyStopping("a", mode="max", best_by={"a": 1.0, "b": 0.5}, name="x"),
    ),
    "a fraction": (
        """
        - class_path: lightning_optim.WeightAveraging
          init_args:
            average: {class_path: EMA, init_args: {decay: 0.99, warmup: null}}
            start: 0.5
            every: 2
            evaluate: false
        """,
        WeightAveraging(EMA(0.99, warmup=None), start=0.5, every=2, evaluate=False),
    ),
}


@pytest.mark.parametrize("way", OTHER_FORMS)
def test_other_forms(way: str, tmp_path: Path) -> None:
    text, expected = OTHER_FORMS[way]
    (built,) = from_yaml(text, tmp_path)
    assert described(built) == described(expected)
    assert built.state_key == expected.state_key


def test_a_wrong_argument_is_reported_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="`max_norm` must be a number"):
        from_yaml(
            """
            - class_path: GradientClipping
              init_args: {policy: {class_path: ClipByNorm, init_args: {max_norm: -1}}}
            """,
            tmp_path,
        )
    with pytest.raises(SystemExit):
        from_yaml("[{class_path: GradientAccumulation, init_args: {k: 4}}]", tmp_path)
    assert "k" in capsys.readouterr().err


def test_on_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML 1.1 reads a bare `on` as true, so this argument needs quotes; the error message shows that."""
    text = """
        - class_path: WeightRegularization
          init_args: {terms: {class_path: L1, init_args: {strength: 0.1, %s: net.*}}}
        """
    assert from_yaml(text % "'on'", tmp_path)[0].terms[0].on == "net.*"  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        from_yaml(text % "on", tmp_path)
    assert "Key must be a string, got: True" in capsys.readouterr().err


def test_descriptions_differ() -> None:
    """`described` tells all expected callbacks apart."""
    texts = [str(described(expected)) for _, expected in OTHER_FORMS.values()]
    assert len(set(texts)) == len(texts)
    assert described(WeightAveraging(EMA(0.9))) != described(WeightAveraging(EMA(0.99)))
