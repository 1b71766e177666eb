"""What a user is told about a wrong call of `optimize`, an error in `weight_by`, and a hook that runs less often."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_optim
from lightning_optim import (
    Clipping,
    GradientAccumulation,
    GradientClipping,
    Linear,
    ManualOptimizationMixin,
    OptimCallback,
    TargetBatchSize,
)
from lightning_optim.base.policy import Policy
from lightning_optim.gradients.accumulation_window import weight_of
from tests.lightning import BoringModel, LightningModule, Trainer, supported


def _fit(module: LightningModule, *callbacks: OptimCallback, batches: int = 2) -> None:
    Trainer(callbacks=list(callbacks), max_epochs=1, limit_train_batches=batches, barebones=True).fit(module)


# ---- optimize --------------------------------------------------------------------------------------------------------


class Manual(ManualOptimizationMixin, BoringModel):
    def __init__(self, optimizers: int, call: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.count, self.call = optimizers, call

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.call(self, super().training_step(batch, batch_idx)["loss"])

    def configure_optimizers(self) -> Any:
        kinds = [torch.optim.SGD, torch.optim.Adam][: self.count]
        return [kind(self.parameters(), lr=0.1) for kind in kinds]


def test_one_optimizer_need_not_be_named() -> None:
    torch.manual_seed(0)
    named = Manual(1, lambda module, loss: module.optimize(loss, module.optimizers()))
    unnamed = Manual(1, lambda module, loss: module.optimize(loss))
    unnamed.load_state_dict(named.state_dict())
    before = named.layer.weight.detach().clone()
    for module in (named, unnamed):
        torch.manual_seed(1)
        _fit(module, GradientAccumulation(2), batches=4)
    assert torch.equal(named.layer.weight, unnamed.layer.weight)
    assert not torch.equal(named.layer.weight, before)


def test_one_of_several_optimizers_must_be_named() -> None:
    with pytest.raises(ValueError, match=r"one of `self.optimizers\(\)`, which are 0 \(SGD\), 1 \(Adam\); got none"):
        _fit(Manual(2, lambda module, loss: module.optimize(loss)))


def test_a_list_or_a_foreign_optimizer_is_none_of_them() -> None:
    with pytest.raises(ValueError, match="got a list of them; call it once for each"):
        _fit(Manual(2, lambda module, loss: module.optimize(loss, module.optimizers())))
    with pytest.raises(ValueError, match=r"which are 0 \(SGD\); got another SGD"):
        _fit(Manual(1, lambda module, loss: module.optimize(loss, torch.optim.SGD(module.parameters(), 0.1))))


@pytest.mark.parametrize("wrapped", [True, False])
def test_swapped_arguments_are_told(wrapped: bool) -> None:
    module = Manual(1, lambda module, loss: module.optimize(module.optimizers(use_pl_optimizer=wrapped), loss))
    with pytest.raises(TypeError, match=r"write `self.optimize\(loss, optimizer\)`: the loss.*comes first, got .*SGD"):
        _fit(module)


def test_a_number_is_no_loss() -> None:
    with pytest.raises(TypeError, match="the loss, a tensor, comes first, got float"):
        _fit(Manual(1, lambda module, loss: module.optimize(1.0)))


# ---- weight_by -------------------------------------------------------------------------------------------------------


def count_tokens(batch: Tensor) -> Any:
    return batch.mask.sum()  # type: ignore[attr-defined]


def test_an_exception_in_weight_by_says_where_it_comes_from_and_is_kept() -> None:
    with pytest.raises(
        RuntimeError, match=r"`GradientAccumulation\(weight_by=count_tokens\)` could not weigh"
    ) as caught:
        _fit(BoringModel(), GradientAccumulation(2, weight_by=count_tokens))
    assert isinstance(caught.value.__cause__, AttributeError)
    assert "a batch of the type Tensor" in str(caught.value)
    assert str(caught.value.__cause__) in str(caught.value)


@pytest.mark.parametrize("weight", [-1, float("nan"), "many", True, None, torch.tensor(-1.0)])
def test_a_wrong_weight_says_where_it_comes_from(weight: Any) -> None:
    def count(batch: Any) -> Any:
        return weight

    wanted = r"`GradientAccumulation\(weight_by=count\)` must return a number >= 0 or a tensor with one element, got "
    with pytest.raises(ValueError, match=wanted + re.escape(repr(weight))):
        _fit(BoringModel(), GradientAccumulation(2, weight_by=count))


@pytest.mark.parametrize(("weight", "kind"), [(torch.ones(3, 512), "Tensor"), (np.ones((3, 512)), "ndarray")])
def test_a_forgotten_sum_is_told_without_the_numbers(weight: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"got a {kind} of shape \(3, 512\); did you mean `\.sum\(\)`\?$"):
        weight_of(None, lambda batch: weight, torch.device("cpu"))


def _wrong_padding(batch: Tensor) -> Tensor:
    return (batch == 99).sum()


def _silent_fit(weight_by: Any, module: LightningModule | None = None, **arguments: Any) -> Trainer:
    trainer = Trainer(
        callbacks=[GradientAccumulation(2, weight_by=weight_by)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        **arguments,
    )  # fmt: skip
    trainer.fit(module or BoringModel())
    return trainer


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"max_epochs": 3, "limit_train_batches": 5}, 3),  # at the end of the first epoch
        ({"max_steps": 4}, 4),
        ({"max_steps": 40, "log_every_n_steps": 4, "limit_train_batches": 64}, 12),  # before it
    ],
)
def test_weights_that_are_all_zero_are_told_once(arguments: dict[str, Any], steps: int) -> None:
    with pytest.warns(UserWarning, match=f"weight_by=_wrong_padding.* 0 for every micro-batch of the first {steps} st"):
        _silent_fit(_wrong_padding, **{"max_epochs": 1} | arguments)


def test_some_windows_of_zeros_are_not_told(tmp_path: Any) -> None:
    weights = itertools.cycle([0.0] * 4 + [1.0] * 2)
    trainer = _silent_fit(lambda batch: next(weights), max_epochs=2, limit_train_batches=6, log_every_n_steps=1)
    # A resumed run may end with windows of zeros.
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = Trainer(
        callbacks=[GradientAccumulation(2, weight_by=_wrong_padding)], max_epochs=3, barebones=True,
        limit_train_batches=6,
    )  # fmt: skip
    other.fit(BoringModel(), ckpt_path=tmp_path / "last.ckpt", **supported(other.fit, weights_only=True))


def test_a_schedule_of_sizes_is_answered_with_a_dictionary() -> None:
    with pytest.raises(
        ValueError, match=r"got Linear\(1, 4\); write the number from each epoch on, such as `{0: 1, 10"
    ):
        GradientAccumulation(Linear(1, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [Linear(1.0, 0.5), {"*": Linear(1.0, 0.5)}, [Linear(1.0, 0.5)]])
def test_a_schedule_of_bounds_is_answered_with_the_policy_that_takes_it(policy: Any) -> None:
    with pytest.raises(ValueError, match=r"; for a schedule write ClipByNorm\(Linear\(1.0, 0.5\)\)$"):
        GradientClipping(policy)


@pytest.mark.parametrize("wrong", ["token", "tokens", "n_tokens"])
def test_a_word_for_tokens_is_answered_with_an_example(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"counts the tokens, such as `lambda batch: .*-100"):
        GradientAccumulation(2, weight_by=wrong)


def test_the_example_counts_tokens() -> None:
    with pytest.raises(ValueError) as caught:
        GradientAccumulation(2, weight_by="token")  # type: ignore[arg-type]
    (example,) = re.findall(r"`(lambda .*?)`", str(caught.value))
    assert eval(example)({"labels": torch.tensor([[5, -100], [7, 8]])}) == 3


# ---- hooks that run less often ---------------------------------------------------------------------------------------


class OwnStep(BoringModel):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)


class OwnZeroGrad(BoringModel):
    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_zero_grad(*args, **kwargs)


def _warnings(module: LightningModule, n: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(module, GradientAccumulation(n))
    return [str(warning.message) for warning in caught if "overrides" in str(warning.message)]


@pytest.mark.parametrize(("kind", "hook"), [(OwnStep, "optimizer_step"), (OwnZeroGrad, "optimizer_zero_grad")])
@pytest.mark.parametrize("n", [2, {0: 1, 1: 2}, TargetBatchSize(4, micro_batch_size=2)], ids=str)
def test_a_hook_that_runs_at_steps_only_is_told_once(kind: Any, hook: str, n: Any) -> None:
    (told,) = _warnings(kind(), n)
    assert told == (
        f"GradientAccumulation accumulates, and {kind.__name__} overrides `{hook}`, which Lightning then calls"
        " once per step and not at every batch: if it counts batches, let it count steps; otherwise nothing is wrong."
    )


@pytest.mark.parametrize(
    ("module", "n"),
    [
        (BoringModel, 2),
        (OwnStep, 1),
        (OwnStep, TargetBatchSize(2, micro_batch_size=2)),
    ],
)
def test_without_such_a_hook_or_accumulation_nothing_is_told(module: Any, n: Any) -> None:
    assert not _warnings(module(), n)


def test_under_manual_optimization_no_hook_is_called_at_batches_anyway() -> None:
    class Both(ManualOptimizationMixin, OwnStep):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimize(super().training_step(batch, batch_idx)["loss"])

    assert not _warnings(Both(), 2)


def test_a_hook_of_our_own_is_not_told() -> None:
    class Ours(OwnStep):
        optimizer_step = OwnStep.optimizer_step

    Ours.__module__ = "lightning_optim.made_up"
    assert not _warnings(Ours(), 2)


# ---- lines for a Trainer ---------------------------------------------------------------------------------------------

POLICIES = [
    kind
    for name in lightning_optim.__all__
    if isinstance(kind := getattr(lightning_optim, name), type) and issubclass(kind, Policy)
    if (issubclass(kind, Clipping) or kind is TargetBatchSize) and "Clipping" not in name
]


@pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.__name__)
def test_each_policy_shows_the_line_for_a_trainer(kind: type) -> None:
    (line,) = re.findall(r"For a Trainer: ``(Trainer\(callbacks=.*\))``\.", str(kind.__doc__))
    trainer = eval(line, {**vars(lightning_optim), "Trainer": functools.partial(Trainer, logger=False)})
    ours = [callback for callback in trainer.callbacks if isinstance(callback, OptimCallback)]
    assert kind.__name__ in line
    assert len(ours) == 1
