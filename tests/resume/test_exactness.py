"""Test the answer to "is a resume from here exact?" at each batch of an epoch of six."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim import GradientAccumulation
from lightning_optim.resume.exactness_checks import resumes_exactly_from_here
from tests.lightning import Callback, LightningModule, Trainer
from tests.resume.killed_runs import fit
from tests.resume.models import BATCHES, ManualNet, Net, PositionLoader, data, shuffling


class Answers(Callback):
    """Ask at the end of each batch whether a resume is exact."""

    def __init__(self) -> None:
        self.exact: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.exact.append(resumes_exactly_from_here(trainer))


class ReadAhead(PositionLoader):
    """Loader with workers, which read ahead of the saved position."""

    num_workers = 2


class Persistent(PositionLoader):
    persistent_workers = True


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(data())


class StatefulStream(DataLoader):
    """Loader that saves its position, and has a length although its data set has none."""

    def __init__(self) -> None:
        super().__init__(Stream(), batch_size=4)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


AT_THE_END = [False] * (BATCHES - 1) + [True]


@pytest.mark.parametrize(
    ("loader", "net", "callbacks", "arguments", "expected"),
    [
        pytest.param(PositionLoader, Net, [], {}, [True] * BATCHES, id="position"),
        pytest.param(shuffling, Net, [], {}, AT_THE_END, id="no-position"),
        pytest.param(ReadAhead, Net, [], {}, AT_THE_END, id="workers"),
        pytest.param(Persistent, Net, [], {}, [False] * BATCHES, id="persistent-workers"),
        pytest.param(StatefulStream, Net, [], {}, AT_THE_END, id="no-length"),
        pytest.param(PositionLoader, ManualNet, [], {}, AT_THE_END, id="manual"),
        pytest.param(
            PositionLoader,
            Net,
            [],
            {"accumulate_grad_batches": 4},
            [False, False, False, True, False, True],
            id="lightnings-window",
        ),
        pytest.param(PositionLoader, Net, [GradientAccumulation(4)], {}, [True] * BATCHES, id="our-window"),
    ],
)
def test_the_answer_at_each_batch(
    loader: Callable[[], Any],
    net: type[Net],
    callbacks: list[Callback],
    arguments: dict[str, Any],
    expected: list[bool],
) -> None:
    answers = Answers()
    fit([*callbacks, answers], loader, net=net, max_epochs=1, val_check_interval=1.0, **arguments)
    assert answers.exact == expected
