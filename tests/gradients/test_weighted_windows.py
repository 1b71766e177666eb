"""Weighted windows: N micro-batches equal one batch, for any N, a short last window, masks and several ranks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import GradientAccumulation, ManualOptimizationMixin
from lightning_optim.gradients.accumulation_window import weight_of
from tests.harness import models, regression, run
from tests.harness.cells import Cell
from tests.harness.process_group import Group
from tests.harness.reference_loop import deviation
from tests.lightning import LightningModule, MixedPrecision, supported

COUNTS = [[6, 1], [1, 9], [3, 3], [8, 2], [0, 5], [2, 7], [4, 1]]
"""Number of samples that count, in each micro-batch, on each of two ranks."""

Batch = tuple[Tensor, Tensor, Tensor]


def _data() -> list[list[Batch]]:
    """Make each micro-batch for each of two ranks: inputs, targets and a mask of the samples that count."""
    generator = torch.Generator().manual_seed(3)
    data = []
    for counts in COUNTS:
        parts = []
        for count in counts:
            x = torch.randn(10, regression.FEATURES, generator=generator)
            y = torch.randn(10, regression.TARGETS, generator=generator)
            parts.append((x, y, torch.arange(10) < count))
        data.append(parts)
    return data


def _masked_loss(index: int, nets: Any, batch: Batch) -> Tensor:
    x, y, mask = batch
    # The second net sees no output of the first, whose weights move before the window's last batch.
    out = nets[0](x) if index == 0 else nets[1](torch.cat([x, y], dim=1))
    losses = (out.float() - (y if index == 0 else y.flip(1))).square().mean(1)
    return (losses * mask).sum() / mask.sum().clamp(min=1)


class Masked(models.Model):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = _masked_loss(0, self.nets, batch)
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> Any:
        data = _data()
        if self.cell.processes == 1:
            return models.Batches([_joined(parts) for parts in data])
        return models.Batches([parts[self.global_rank] for parts in data])


class MaskedManual(ManualOptimizationMixin, Masked):
    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for index, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
            self.optimize(_masked_loss(index, self.nets, batch), optimizer)


def _joined(parts: list[Batch]) -> Batch:
    x, y, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return x, y, mask


def _count(batch: Batch) -> Tensor:
    return batch[2].sum()


def _module(cell: Cell) -> Masked:
    base = Masked if cell.kind == "automatic" else MaskedManual
    if cell.strategy == "fsdp2":
        base = type("Sharded", (base,), {"configure_model": models.ShardedModel.configure_model})
    return base(cell)


def job(cell: Cell, n: int, **changes: Any) -> dict[str, Tensor]:
    accumulation = GradientAccumulation(n, weight_by=_count)
    module = _module(cell)
    run.make_trainer(cell, [accumulation], **({"limit_val_batches": 0} | changes)).fit(module)
    return models.full_weights(module)


def _reference(cell: Cell, n: int) -> dict[str, Tensor]:
    """Train with one batch for each window: the mean over all counted samples of its micro-batches and ranks."""
    net = regression.build_nets(cell.optimizers)
    nets = regression.nets_of(net)
    optimizers = [torch.optim.SGD(own.parameters(), lr=cell.lr, momentum=0.9) for own in nets]
    data = [_joined(parts) for parts in _data()]
    for _ in range(2):
        for start in range(0, len(data), n):
            whole = _joined(data[start : start + n])
            for index, (own, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                grads = torch.autograd.grad(_masked_loss(index, nets, whole), list(own.parameters()))
                for parameter, grad in zip(own.parameters(), grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
    return {f"net.{name}": parameter.detach() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("n", [1, 3, 4, 7])
@pytest.mark.parametrize("kind", ["automatic", "manual", "two"])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_n_micro_batches_are_one_batch(strategy: Any, kind: Any, n: int, group: Group) -> None:
    cell = Cell(kind, "32-true", strategy, "1")
    wanted = _reference(cell, n)
    for weights in [job(cell, n)] if strategy == "single" else group.run(job, cell, n):
        assert max(deviation(weights, wanted).values()) < 1e-6


@pytest.mark.parametrize("kind", ["automatic", "two"])
@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_under_a_loss_scale(strategy: Any, kind: Any, group: Group) -> None:
    cell = Cell(kind, "16-mixed", strategy, "1")
    wanted = _reference(cell, 3)
    for weights in [job(cell, 3)] if strategy == "single" else group.run(job, cell, 3):
        assert max(deviation(weights, wanted).values()) < 5e-4


@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_a_model_in_double_precision_is_exact_to_its_last_digits(kind: Any) -> None:
    cell = Cell(kind, "32-true", "single", "1")
    generator = torch.Generator().manual_seed(5)
    data = [torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (1, 7, 3, 5, 2, 9)]

    class Double(ManualOptimizationMixin, LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.automatic_optimization = kind == "automatic"

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            loss = (batch @ self.weight).square().mean()
            if self.automatic_optimization:
                return loss
            self.optimize(loss)
            return None

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ends = []
    for batches, n in ((data, 3), ([torch.cat(data[:3]), torch.cat(data[3:])], 1)):
        module, accumulation = Double(), GradientAccumulation(n, weight_by=len)
        run.make_trainer(cell, [accumulation], max_epochs=3, limit_val_batches=0, val_check_interval=1.0).fit(
            module, models.Batches(batches)
        )
        ends.append(module.weight.detach())
    assert float((ends[0] - ends[1]).abs().max()) < 1e-14


def test_the_mean_of_means_is_another() -> None:
    cell = Cell("automatic", "32-true", "single", "1")
    module = Masked(cell)
    run.make_trainer(cell, [GradientAccumulation(3)], limit_val_batches=0).fit(module)
    assert max(deviation(models.full_weights(module), _reference(cell, 3)).values()) > 1e-3


@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e6])
def test_the_unit_does_not_matter_and_scaled_gradients_stay_in_range(weight: float) -> None:
    """With a factor of a million, gradients times the loss scale would be infinite in half precision."""
    cell = Cell("automatic", "16-mixed", "single", "4short")
    seen = []

    class Watching(models.Model):
        def on_after_backward(self) -> None:
            seen.append(max(float(p.grad.abs().max()) for p in self.parameters()))

    module = Watching(cell)
    run.make_trainer(cell, [GradientAccumulation(4, weight_by=lambda batch: weight)]).fit(module)
    plain = models.build(cell)
    run.make_trainer(cell, [GradientAccumulation(4)]).fit(plain)
    assert max(deviation(module.raw, plain.raw).values()) < 1e-6
    assert max(seen) < 65504


def test_windows_that_begin_with_nothing_stay_in_range() -> None:
    """The first window has the unit 1; after it the scaler has nothing to skip."""
    cell = Cell("automatic", "16-mixed", "single", "4")
    weights = itertools.cycle([0, 4096, 4096, 4096])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    accumulation, module = GradientAccumulation(4, weight_by=lambda batch: next(weights)), models.build(cell)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    run.make_trainer(cell, [accumulation], plugins=plugins, max_epochs=3).fit(module)
    assert accumulation.steps == [5]


class Tokens(LightningModule):
    """Classification whose second micro-batch has ignored targets only, for which torch's mean loss is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 3)
        self.data = [(torch.randn(4, 2), torch.tensor(y)) for y in ([0, 1, 2, -100], [-100] * 4, [1, -100, -100, -100])]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_micro_batch_of_ignored_classes_adds_nothing() -> None:
    cell, module = Cell("automatic", "32-true", "single", "1"), Tokens()
    x, y = (torch.cat(parts) for parts in zip(*module.data, strict=True))
    (grad,) = torch.autograd.grad(cross_entropy(module.net(x), y), module.net.weight)
    wanted = module.net.weight.detach() - 0.1 * grad
    accumulation = GradientAccumulation(3, weight_by=lambda batch: (batch[1] != -100).sum())
    trainer = run.make_trainer(cell, [accumulation], max_epochs=1, limit_val_batches=0, val_check_interval=1.0)
    trainer.fit(module, models.Batches(module.data))
    torch.testing.assert_close(module.net.weight.detach(), wanted)


def test_by_sample_with_a_short_last_batch() -> None:
    """Of ten samples in batches of four, the last batch has two, and has the weight 2."""

    class Short(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (batch[0] @ self.weight).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    cell = Cell("automatic", "32-true", "single", "1")
    module = Short()
    accumulation = GradientAccumulation(3, weight_by="sample")
    loader = DataLoader(TensorDataset(data), batch_size=4)
    run.make_trainer(cell, [accumulation], max_epochs=1, val_check_interval=1.0).fit(module, loader)
    start = torch.tensor([1.0, -1.0], requires_grad=True)
    (grad,) = torch.autograd.grad((data @ start).square().mean(), start)
    torch.testing.assert_close(module.weight.detach(), start.detach() - 0.1 * grad, rtol=1e-6, atol=1e-7)


def test_the_logged_loss_is_not_scaled() -> None:
    cell = Cell("automatic", "32-true", "single", "1")
    logs = []
    for callbacks in ([GradientAccumulation(7, weight_by=_count)], [GradientAccumulation(7)]):
        recorder = run.Recorder()
        run.make_trainer(cell, callbacks, limit_val_batches=0, logger=recorder, max_epochs=1).fit(Masked(cell))
        logs.append(recorder.logged["loss"])
    assert logs[0] == logs[1]


def _resumed(cell: Cell, folder: str) -> dict[str, Tensor]:
    """Stop within a window, and resume from the checkpoint."""
    path = f"{folder}/{cell}.ckpt"

    def trainer(**changes: Any) -> Any:
        # Within the second window: before any step Lightning cannot resume FSDP2.
        callbacks = [GradientAccumulation(4, weight_by=_count), run.SaveAfterBatch(path, batch=5)]
        return run.make_trainer(cell, callbacks, limit_val_batches=0, **changes)

    trainer(max_epochs=1).fit(_module(cell))
    module = _module(cell)
    resumed = trainer()
    resumed.fit(module, ckpt_path=path, **supported(resumed.fit, weights_only=True))
    return models.full_weights(module)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_a_checkpoint_holds_an_open_window_with_its_weights(strategy: Any, group: Group, tmp_path: Any) -> None:
    cell = Cell("automatic", "32-true", strategy, "1")
    wanted = _reference(cell, 4)
    arguments = (cell, str(tmp_path))
    for weights in [_resumed(*arguments)] if strategy == "single" else group.run(_resumed, *arguments):
        assert max(deviation(weights, wanted).values()) < 1e-6


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [torch.ones(1), torch.tensor(1), np.int64(1), np.float32(1), 1.0])
def test_one_number_of_any_kind_is_a_weight(weight: Any) -> None:
    assert weight_of(None, lambda batch: weight, torch.device("cpu")).item() == 1.0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n": 0}, "`n` must be an integer >= 1, a dictionary.*got 0"),
        ({"n": {0: True}}, "`n` must be an integer >= 1.*got {0: True}"),
        ({"n": 2, "weight_by": "token"}, "`weight_by` must be 'batch', 'sample' or a function.*got 'token'"),
    ],
)
def test_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GradientAccumulation(**arguments)
