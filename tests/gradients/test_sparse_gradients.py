"""Sparse gradients, as of `Embedding(sparse=True)`, give the same results as dense gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import (
    AGC,
    EMA,
    L1,
    L2,
    AutoClip,
    Centralize,
    ClipByNorm,
    ClipByValue,
    Clipping,
    ElasticNet,
    GradientAccumulation,
    GradientClipping,
    GradientMonitor,
    ManualOptimizationMixin,
    Noise,
    Penalty,
    ProximalL1,
    SharpnessAwareMixin,
    WeightAveraging,
    WeightRegularization,
    ZClip,
    gradients_of,
)
from tests.harness.models import Batches
from tests.harness.process_group import Group
from tests.harness.run import LivingEnvironment, Recorder, SaveAfterBatch
from tests.lightning import Callback, LightningModule, MisconfigurationException, Trainer

Index = list[list[int]]

WORDS: Index = [[1, 1, 2], [2, 5, 5], [7, 1, 0], [4, 4, 4], [2, 0, 9], [3, 3, 1]]
"""Words that occur twice in a batch, and again in the next one; 6 and 8 never occur."""


class Words(LightningModule):
    """An embedding, an embedding bag and a dense layer; some batches do not use the second optimizer's embedding."""

    def __init__(self, sparse: bool = True, optimizer: Any = torch.optim.SGD, mode: str = "sum") -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(10, 3, sparse=sparse)
        self.bag = nn.EmbeddingBag(10, 3, sparse=sparse, mode=mode)
        self.head = nn.Linear(3, 2)
        self.optimizer = optimizer

    def loss(self, words: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(words)).sum(0) + self.bag(words[None])[0]
        return (self.head(hidden) - torch.tensor([1.0, -1.0])).square().sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def train_dataloader(self) -> Any:
        return Batches([torch.tensor(words) for words in WORDS])  # type: ignore[misc]

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.03)


class Manual(ManualOptimizationMixin, Words):
    def __init__(self, sparse: bool = True) -> None:
        super().__init__(sparse)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.optimize(self.loss(batch), self.optimizers())


class Sharp(SharpnessAwareMixin, Words):
    def __init__(self, sparse: bool = True, adaptive: bool = False) -> None:
        super().__init__(sparse, rho=0.2, adaptive=adaptive)


def fit(module: LightningModule, *callbacks: Callback, epochs: int = 2, ckpt: Any = None, **options: Any) -> Any:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        callbacks=list(callbacks), max_epochs=epochs, accelerator="cpu", **{"logger": False, **quiet, **options}
    )
    trainer.fit(module, ckpt_path=ckpt)
    return module


def apart(one: LightningModule, other: LightningModule) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


CLIPPINGS: dict[str, Any] = {
    "by norm": lambda: ClipByNorm(0.5),
    "by largest": lambda: ClipByNorm(0.5, norm_type=float("inf")),
    "by tensor": lambda: ClipByNorm(0.3, norm_type=1.0, scope="tensor"),
    "by group": lambda: ClipByNorm(0.3, scope="group"),
    "by value": lambda: ClipByValue(0.1),
    "AGC": lambda: AGC(0.05),
    "AutoClip": lambda: AutoClip(20.0),
    "ZClip": lambda: ZClip(z=0.1, warmup=2),
    "centralized": lambda: Centralize(),
    "in turn": lambda: [Centralize(), AGC(0.05), ClipByNorm(0.3)],
    "the embeddings alone": lambda: ClipByNorm(0.2, on=nn.Embedding),
    "the others alone": lambda: ClipByNorm(0.2, exclude=["embed.*", nn.EmbeddingBag]),
}


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "ignore"])
@pytest.mark.parametrize("policy", CLIPPINGS)
def test_clipping_is_that_of_dense_gradients(policy: str, nonfinite: Any) -> None:
    """The norm of a sparse gradient is that of its summed rows, for each value of `nonfinite`."""
    sparse, dense = (fit(Words(kind), GradientClipping(CLIPPINGS[policy](), nonfinite)) for kind in (True, False))
    assert sparse.embed.weight.grad is None or sparse.embed.weight.grad.is_sparse
    assert apart(sparse, dense) < 1e-6
    assert apart(sparse, fit(Words())) > 1e-3, "nothing was clipped"


class Spread(Penalty):
    """The square of the column sums, which needs whole matrices."""

    needs = "matrices"

    def _value(self, weights: Any) -> Tensor:
        return torch.stack([weight.sum(0).square().sum() for weight in weights]).sum()

    def _add_grad_(self, weights: Any, grads: Any) -> None:
        for weight, grad in zip(weights, grads, strict=True):
            grad.add_(2.0 * weight.sum(0))


class CenterColumns(Clipping):
    """Subtract the mean of each column, which needs whole matrices."""

    needs = "matrices"

    def _clip_(self, grads: Any, weights: Any) -> None:
        for grad in grads:
            grad.sub_(grad.mean(0))


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize(("kind", "run_by"), [(Spread, WeightRegularization), (CenterColumns, GradientClipping)])
def test_a_formula_on_whole_matrices_does_not_get_the_rows_of_a_sparse_gradient(
    kind: Any, run_by: Any, gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "gathers", gathers)
    with pytest.raises(MisconfigurationException, match=r"shape \(10, 3\) has a sparse gradient.*`exclude=`"):
        fit(Words(), run_by(kind()))
    others = ["embed.*", "bag.*", "head.bias"]
    sparse, dense = (fit(Words(sparse), run_by(kind(exclude=others))) for sparse in (True, False))
    assert apart(sparse, dense) < 1e-6
    assert apart(sparse, fit(Words())) > 1e-3


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_monitor_clipping_and_averaging_together(optimizer: Any, mode: str) -> None:
    logged, fitted = [], []
    for kind in (True, False):
        recorder = Recorder()
        callbacks = [GradientMonitor("parameter"), GradientClipping(0.5), WeightAveraging(EMA(0.5))]
        fitted.append(fit(Words(kind, optimizer, mode), *callbacks, logger=recorder, log_every_n_steps=1))
        logged.append(recorder.logged)
    assert apart(*fitted) < 1e-6
    assert logged[0].keys() == logged[1].keys() >= {"gradients/norm/embed.weight", "gradients/norm_clipped"}
    for name, values in logged[0].items():
        assert values == pytest.approx(logged[1][name], rel=1e-4, abs=1e-6), name


def test_sparse_adam_gets_sparse_gradients() -> None:
    """SparseAdam takes no dense gradients, so a penalty adds none to an embedding that the batch does not use."""

    class Rare(Words):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + self.rare(batch[:1]).sum() if batch_idx == 3 else loss

        def __init__(self) -> None:
            super().__init__(mode="mean")
            self.rare = nn.Embedding(10, 3, sparse=True)
            self.head.requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SparseAdam([p for p in self.parameters() if p.requires_grad], lr=0.1)

    regularization = WeightRegularization([L1(0.01), L2(0.01)])
    before = Rare().rare.weight.detach().clone()
    module = fit(Rare(), regularization, GradientClipping(1.0), GradientMonitor(), epochs=1)
    assert regularization.steps == [6]
    moved = (module.rare.weight != before).any(1).nonzero().flatten().tolist()
    assert moved == [WORDS[3][0]], "rows that the fourth batch does not name"


class ReferencePenalty(Callback):
    """Add the gradient of a penalty to the rows that have a gradient."""

    def __init__(self, l1: float, l2: float) -> None:
        self.l1, self.l2 = l1, l2

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        with torch.no_grad():
            for weight in (pl_module.embed.weight, pl_module.bag.weight, pl_module.head.weight):
                rows = weight.grad.abs().sum(1, keepdim=True) > 0
                weight.grad += rows * (self.l1 * weight.sign() + 2.0 * self.l2 * weight)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("term", "l1", "l2"), [(L1(0.1), 0.1, 0.0), (L2(0.1), 0.0, 0.1), (ElasticNet(0.1, 0.2), 0.1, 0.2)]
)
def test_a_penalty_acts_on_the_rows_that_have_a_gradient(term: Any, l1: float, l2: float, accumulation: int) -> None:
    windows = [GradientAccumulation(accumulation)]
    sparse = fit(Words(), WeightRegularization(term), *windows)
    reference = fit(Words(False), GradientAccumulation(accumulation), ReferencePenalty(l1, l2))
    assert apart(sparse, reference) < 1e-6
    never = [6, 8]
    assert torch.equal(sparse.embed.weight[never], Words().embed.weight[never])


def test_the_logged_penalty_is_that_of_all_rows() -> None:
    recorder, module = Recorder(), Words()
    right = float(sum(w.detach().square().sum() for w in (module.embed.weight, module.bag.weight, module.head.weight)))
    fit(module, WeightRegularization(L2(0.5)), logger=recorder, log_every_n_steps=1, max_steps=1)
    assert recorder.logged["regularization/l2"][0] == pytest.approx(0.5 * right, rel=1e-6)


def test_a_projection_acts_on_all_rows() -> None:
    callbacks = [WeightRegularization(ProximalL1(0.3)) for _ in range(2)]
    assert apart(fit(Words(), callbacks[0]), fit(Words(False), callbacks[1])) < 1e-6


def test_noise_is_on_the_rows_that_have_a_gradient() -> None:
    noisy, plain = (fit(Words(), GradientClipping(one), max_steps=1) for one in (Noise(4.0), ClipByNorm(1e6)))
    assert (noisy.embed.weight != plain.embed.weight).any(1).nonzero().flatten().tolist() == [1, 2]


class Broken(Words):
    """Put NaN into the gradient of one word in the third batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return (
            loss + self.bag.weight[0].sum() * 0.0 + self.embed(batch).sum() * (float("nan") if batch_idx == 2 else 0.0)
        )


@pytest.mark.parametrize("policy", [ClipByNorm(1.0), ClipByValue(0.1), ClipByNorm(0.5, exclude="embed.*")])
def test_nonfinite_values_of_a_sparse_gradient_are_found(policy: Any) -> None:
    clipping = GradientClipping(policy)
    module = fit(Broken(), clipping)
    assert clipping.skipped_at == [[0, 0, 2], [0, 1, 2]]
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    with pytest.raises(RuntimeError, match=r"the gradients of \['embed.weight'\] are not finite"):
        fit(Broken(), GradientClipping(policy, nonfinite="raise"))


@pytest.mark.parametrize("kind", [Words, Manual])
@pytest.mark.parametrize("n", [2, 4])
def test_windows(kind: Any, n: int) -> None:
    """The last window of six batches is short with four, so its gradients are scaled."""
    sparse, dense = (fit(kind(sparse), GradientAccumulation(n), GradientClipping(0.5)) for sparse in (True, False))
    assert apart(sparse, dense) < 1e-6


@pytest.mark.parametrize("kind", [Words, Manual])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_resumed_within_a_window(kind: Any, batch: int, tmp_path: Path) -> None:
    """The resumed run is equal bit for bit, and writing the checkpoint changes nothing."""
    path = tmp_path / "within.ckpt"
    others = lambda: [GradientAccumulation(4), GradientClipping(0.5)]  # noqa: E731
    whole = fit(kind(), *others(), SaveAfterBatch(path, batch))
    again = kind()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert apart(whole, fit(again, *others(), ckpt=path)) == 0.0
    assert apart(whole, fit(kind(), *others())) == 0.0


class Ranked(Words):
    """Give each rank words of its own."""

    def train_dataloader(self) -> Any:
        return Batches([torch.tensor(WORDS[(place + self.global_rank) % 6]) for place in range(6)])  # type: ignore[misc]


def on_two_ranks() -> float:
    """Return the difference between training with sparse and dense gradients; some words are on one rank only."""
    fitted = []
    for sparse in (True, False):
        others = [GradientMonitor(), GradientClipping([AGC(0.05), ClipByNorm(0.3)]), WeightAveraging(EMA(0.5))]
        options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "plugins": [LivingEnvironment()]}
        fitted.append(fit(Ranked(sparse), GradientAccumulation(4), *others, **options))
    return apart(*fitted)


def test_under_ddp(group: Group) -> None:
    assert max(group.run(on_two_ranks)) < 1e-6


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_is_that_of_dense_gradients(adaptive: bool) -> None:
    sparse, dense = (fit(Sharp(kind, adaptive), GradientClipping(1.0)) for kind in (True, False))
    assert apart(sparse, dense) < 1e-6
    assert apart(sparse, fit(Words(), GradientClipping(1.0))) > 1e-3


def test_gradients_of_are_coalesced() -> None:
    """In a hand-written loop too, the optimizer uses what is written to the values."""
    module = Words()
    module.loss(torch.tensor(WORDS[0])).backward()
    module.loss(torch.tensor(WORDS[1])).backward()
    optimizer, before = module.configure_optimizers(), module.embed.weight.detach().clone()
    weights, grads = gradients_of(optimizer)
    assert [id(weight) for weight in weights] == [id(parameter) for parameter in module.parameters()]
    assert grads[0].is_coalesced()
    assert grads[0].indices().tolist() == [[1, 2, 5]]
    assert grads[0] is module.embed.weight.grad
    grads[0].values().fill_(1.0)
    optimizer.step()
    assert torch.allclose((before - module.embed.weight)[[1, 2, 5]], torch.full((3, 3), 0.03))
