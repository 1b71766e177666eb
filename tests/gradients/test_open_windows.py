"""A run that resumes from a checkpoint within an accumulation window equals the uninterrupted one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import GradientAccumulation, ManualOptimizationMixin
from tests.harness.models import Batches
from tests.harness.run import SaveAfterBatch
from tests.lightning import Callback, LightningModule, Trainer


class Lines(LightningModule):
    """Fit a line through points with different weights; the loader saves its position."""

    weights = (3, 1, 7, 2, 5, 4, 1, 6, 9, 2)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.other = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self.net, batch)

    def loss(self, net: nn.Module, batch: Any) -> Tensor:
        x, _ = batch
        return (net(x) - x.sum(1, keepdim=True)).square().mean()

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(5)
        data = [(torch.randn(4, 3, generator=generator), torch.tensor(weight)) for weight in self.weights]
        return Batches(data)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


class InTurn(ManualOptimizationMixin, Lines):
    """Two optimizers whose windows open and close at different batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        if batch_idx % 3 != 1:
            self.optimize(self.loss(self.net, batch), first)
        else:
            self.optimize(self.loss(self.other, batch), second)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (self.net, self.other)]


class BeginsWithNothing(Lines):
    """Windows of three begin with a weight of 0, whose unit is that of the window before."""

    weights = (7, 3, 2, 0, 5, 4, 0, 1, 9, 2)


class Adapter(Lines):
    """Save an adapter alone, from a `state_dict` without arguments; the base is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.other.requires_grad_(False)
        self.strict_loading = False

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith("net.")}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(lambda x: self.net(x) + self.other(x), batch)  # type: ignore[arg-type]


class Loose(Lines):
    """Train tensors outside of `state_dict`, in a parameter group of their own, and save their values in a hook."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "loose", [torch.ones(1, requires_grad=True), torch.zeros(4, 1, requires_grad=True)])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scale, shift = self.loose
        return self.loss(lambda x: self.net(x) * scale + shift, batch)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loose"] = [tensor.detach().clone() for tensor in self.loose]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        with torch.no_grad():
            for tensor, saved in zip(self.loose, checkpoint["loose"], strict=True):
                tensor.copy_(saved)

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(self.net.parameters())}, {"params": list(self.loose), "lr": 0.01}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def fit(
    module: Any, n: Any, *callbacks: Callback, weight_by: Any = "batch", ckpt: Any = None, epochs: int = 2
) -> dict[str, Tensor]:
    """Train, and return copies of all trained tensors by name."""
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    accumulation = GradientAccumulation(n, weight_by=weight_by)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[accumulation, *callbacks], **quiet)
    trainer.fit(module, ckpt_path=ckpt)
    loose = {f"loose {place}": tensor for place, tensor in enumerate(getattr(module, "loose", []))}
    return {name: tensor.detach().clone() for name, tensor in {**dict(module.named_parameters()), **loose}.items()}


def assert_resumed(kind: Any, n: Any, batch: int, path: Path, weight_by: Any = "batch") -> None:
    whole = fit(kind(), n, SaveAfterBatch(path, batch), weight_by=weight_by)
    undisturbed = fit(kind(), n, weight_by=weight_by)
    resumed = fit(kind(), n, weight_by=weight_by, ckpt=path)
    assert all(torch.equal(whole[name], undisturbed[name]) for name in whole), "to write a file changed something"
    off = {name: float((whole[name] - resumed[name]).abs().max()) for name in whole}
    assert not any(off.values()), off


@pytest.mark.parametrize("batch", range(10))
@pytest.mark.parametrize("kind", [InTurn, BeginsWithNothing])
def test_weighted_windows(kind: Any, batch: int, tmp_path: Path) -> None:
    """The unit of the batch weights is resumed, for open windows and for one that begins after the checkpoint."""
    assert_resumed(kind, 3, batch, tmp_path / "a.ckpt", weight_by=lambda batch: batch[1] * 1.1)


class Nothing(Lines):
    """The batches of the first window all have weight 0, and so a gradient of zero."""

    weights = (0, 0, 0, 3, 2, 5, 4, 1, 6, 2)


def test_a_window_without_weight_moves_nothing() -> None:
    class Rest(Nothing):
        def train_dataloader(self) -> Any:
            return Batches(super().train_dataloader().batches[3:])

    # In one epoch: in the next one the momentum moves on.
    whole, rest = (fit(kind(), 3, weight_by=lambda batch: batch[1], epochs=1) for kind in (Nothing, Rest))
    assert all(torch.allclose(whole[name], rest[name], atol=1e-6) for name in rest)


@pytest.mark.parametrize("batch", [10, 12, 13, 17])
def test_a_size_that_changes_by_epoch(batch: int, tmp_path: Path) -> None:
    """A resume in the middle of an epoch uses that epoch's size, although Lightning calls no `on_train_epoch_start`."""
    assert_resumed(Lines, {0: 2, 1: 4}, batch, tmp_path / "a.ckpt")


@pytest.mark.parametrize("kind", [Adapter, Loose])
@pytest.mark.parametrize("batch", [0, 1, 2, 9])
def test_tensors_outside_of_the_state_dict(kind: Any, batch: int, tmp_path: Path) -> None:
    assert_resumed(kind, 3, batch, tmp_path / "a.ckpt")


def test_a_loose_tensor_is_saved_by_its_place_in_the_optimizer(tmp_path: Path) -> None:
    fit(Loose(), 3, SaveAfterBatch(tmp_path / "a.ckpt", 1))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["GradientAccumulation"]["by_rank"][0]
    loose = {"optimizers.0.param_groups.1.params.0", "optimizers.0.param_groups.1.params.1"}
    assert saved.keys() == loose | {name for name, _ in Loose().net.named_parameters("net")}


def test_the_mean_over_ranks_uses_the_gradients_that_each_has() -> None:
    """A parameter without a gradient on one rank gets the sum over the others; sparse gradients are summed too."""
    from lightning_optim.gradients.gradient_accumulation import _mean

    sparse = torch.tensor([[0.0, 0.0], [2.0, 4.0]]).to_sparse(1)
    ranks = [{"a": torch.tensor([1.0]), "s": sparse}, {"a": torch.tensor([3.0]), "b": torch.tensor([8.0]), "s": sparse}]
    mean = _mean(ranks)
    assert (mean["a"], mean["b"]) == (2.0, 4.0)
    assert mean["s"].to_dense().tolist() == [[0.0, 0.0], [2.0, 4.0]]
