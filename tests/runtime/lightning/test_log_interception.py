"""`intercept_log` mutes, taps and collects what a step logs: in several loaders, and under DDP."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_optim.runtime.lightning.log_interception import LoggedValue, intercept_log
from tests.harness.process_group import Group
from tests.harness.run import LivingEnvironment
from tests.lightning import Callback, LightningModule, Trainer
from tests.runtime.lightning.canaries import Model, fit, numbers


class TwoSets(Model):
    """Logs by name and by position, in a dictionary, a metric, with a batch size and without."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = torchmetrics.MeanMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("value", batch.mean(), True, on_epoch=True)
        return self.net(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.metric(batch)
        self.log_dict({"loss": batch.mean(), "largest": batch.max()}, sync_dist=True)
        self.log("metric", self.metric)
        self.log(f"own/{dataloader_idx}", batch.mean(), add_dataloader_idx=False, batch_size=3)


class Intercepting(Callback):
    """Intercepts from the start to the end of training steps, or of validations."""

    def __init__(self, stage: str, handler: Any) -> None:
        self.handler, self.context = handler, None
        setattr(self, f"on_{stage}_start", lambda trainer, module, *args: self.enter(module))
        setattr(self, f"on_{stage}_end", lambda *args: self.leave())

    def enter(self, module: LightningModule) -> None:
        self.context = intercept_log(module, self.handler)  # type: ignore[assignment]
        self.context.__enter__()  # type: ignore[attr-defined]

    def leave(self) -> None:
        self.context.__exit__(None, None, None)  # type: ignore[attr-defined]


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _fit(*callbacks: Callback, **options: Any) -> dict[str, float]:
    sets = [numbers(5, 2), numbers(3, 2)]
    return _metrics(fit(TwoSets(), *callbacks, validation=sets, training=numbers(5, 2), **options))


def _means(tapped: list[tuple[str, float, int]]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for key, value, size in tapped:
        total = sums.setdefault(key, [0.0, 0.0])
        total[0] += value * size
        total[1] += size
    return {key: total / size for key, (total, size) in sums.items()}


def _tap(tapped: list[tuple[str, float, int]], logged: LoggedValue) -> None:
    if isinstance(logged.value, Tensor):
        tapped.append((logged.key, float(logged.value), logged.batch_size))
    logged.forward()


def test_a_tap_sees_what_lightning_logs_in_two_loaders() -> None:
    expected, tapped = _fit(), []  # type: ignore[var-annotated]
    found = _fit(Intercepting("validation", functools.partial(_tap, tapped)))
    assert found == expected
    means = _means(tapped)
    assert {
        "loss/dataloader_idx_0",
        "largest/dataloader_idx_1",
        "own/0",
        "own/1",
    } < means.keys()
    assert means == pytest.approx({name: found[name] for name in means})
    assert {size for key, _, size in tapped if key == "loss/dataloader_idx_0"} == {2, 1}
    assert {size for key, _, size in tapped if key == "own/0"} == {3}


def test_a_tap_of_training_steps() -> None:
    expected, seen = _fit(), []  # type: ignore[var-annotated]

    def handler(logged: LoggedValue) -> None:
        seen.append((logged.key, logged.hook, logged.dataloader_idx, logged.batch_size, logged.options))
        logged.forward()

    assert _fit(Intercepting("train_batch", handler)) == expected
    assert seen[0] == ("value", "training_step", None, 2, {"prog_bar": True, "on_epoch": True})
    assert [size for key, _, _, size, _ in seen if key == "value"] == [2, 2, 1]
    assert {key for key, *_ in seen} == {"value"}


def test_collected_values_are_not_logged() -> None:
    collected: list[tuple[str, str | None, Any]] = []
    found = _fit(Intercepting("validation", lambda logged: collected.append((logged.name, logged.hook, logged.value))))
    assert not {name for name in found if "dataloader" in name or "own" in name}
    assert {"value"} <= found.keys()
    assert {hook for _, hook, _ in collected} == {"validation_step"}
    assert any(isinstance(value, torchmetrics.Metric) for *_, value in collected)


@pytest.mark.parametrize("stage", ["validation", "train_batch"])
def test_muted_steps_log_nothing_and_the_rest_as_before(stage: str) -> None:
    expected, found = _fit(), _fit(Intercepting(stage, None))
    of_training = {"value", "value_step", "value_epoch"}
    kept = {name for name in expected if (name in of_training) == (stage == "validation")}
    assert found == {name: expected[name] for name in kept} and kept


def test_log_is_as_before_after_an_error() -> None:
    module = TwoSets()
    module.child = Model()
    with pytest.raises(ZeroDivisionError), intercept_log(module):
        module.log("a", 1.0)
        module.child.log("a", 1.0)
        _ = 1 / 0
    assert "log" not in vars(module) and "log" not in vars(module.child)
    mine = lambda *args, **options: None  # noqa: E731
    module.log = mine  # type: ignore[method-assign]
    with intercept_log(module, lambda logged: None):
        assert module.log is not mine
    assert module.log is mine


class Own(LightningModule):
    """Overrides `log` and `log_dict`."""

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"called with {name}")

    def log_dict(self, values: Any, *args: Any, **kwargs: Any) -> None:
        super().log_dict({f"own/{name}": value for name, value in values.items()}, *args, **kwargs)


def test_log_is_intercepted_in_subclasses_that_override_it() -> None:
    module, seen = Own(), []
    with intercept_log(module, lambda logged: seen.append((logged.name, logged.value, logged.options["on_step"]))):
        module.log("a", 1.0, on_step=True)
        module.log_dict({"b": 2.0}, on_step=False)
    assert seen == [("a", 1.0, True), ("own/b", 2.0, False)]
    with pytest.raises(AssertionError, match="called with a"):
        module.log("a", 1.0)
    with intercept_log(module, lambda logged: logged.forward()), pytest.raises(AssertionError, match="called with b"):
        module.log("b", 1.0)


def test_a_compiled_step_is_not_compiled_again_by_muting() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = Model()
    step = torch.compile(lambda batch: (model.log("a", 1.0), model.net(batch))[1], backend=backend)
    for _ in range(4):
        with intercept_log(model):
            step(torch.ones(1, 1))
    assert len(compiled) == 1


# ---- two processes ---------------------------------------------------------------------------------------------------


def _ddp() -> tuple[dict[str, float], dict[str, float], list[tuple[str, float, int]]]:
    tapped: list[tuple[str, float, int]] = []
    results = []
    for callbacks in ([], [Intercepting("validation", functools.partial(_tap, tapped))]):
        rank = torch.distributed.get_rank()
        sets = [
            DataLoader(torch.arange(float(count)).reshape(-1, 1) + 10 * rank, 2)  # type: ignore[arg-type]
            for count in (5, 3)
        ]
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            plugins=[LivingEnvironment()],
            max_epochs=1,
            callbacks=callbacks,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = Model()
        model.validation_step = functools.partial(_validate, model)  # type: ignore[method-assign]
        trainer.fit(model, numbers(4, 2), sets)
        results.append(_metrics(trainer))
    return results[0], results[1], tapped


def _validate(model: LightningModule, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
    model.log_dict({"loss": batch.mean()}, sync_dist=True)


def test_a_tap_under_ddp_sees_the_values_of_its_rank(group: Group) -> None:
    ranks = group.run(_ddp)
    for plain, found, _ in ranks:
        assert plain == found
    of_ranks = [_means(tapped) for *_, tapped in ranks]
    assert of_ranks[0]["loss/dataloader_idx_0"] == 2.0 and of_ranks[1]["loss/dataloader_idx_0"] == 12.0
    together = _means([value for *_, tapped in ranks for value in tapped])
    assert together == pytest.approx({name: ranks[0][1][name] for name in together})
