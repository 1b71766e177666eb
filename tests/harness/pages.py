"""Read the code of the docs, and run it: the blocks of a page in their order, in one namespace."""

from __future__ import annotations

import ast
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim
from tests.lightning import PACKAGE, LightningDataModule, LightningModule, Trainer

ROOT = Path(lightning_optim.__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])

# Arguments that a page's Trainer has unless it names them, as Lightning itself takes them from the environment.
TRAINER = {"PL_TRAINER_MAX_EPOCHS": "4", "PL_TRAINER_ACCELERATOR": "cpu", "PL_TRAINER_ENABLE_PROGRESS_BAR": "False"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: The word behind the fence.
        line: The number of its first line of code in the page.
        code: Its code, without the indentation of a list.
    """

    language: str
    line: int
    code: str


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page, or those of one language."""
    text = page.read_text()
    fenced = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE)
    found = [Block(f[2], text[: f.start(3)].count("\n") + 1, textwrap.dedent(f[3])) for f in fenced]
    return [block for block in found if language in (None, block.language)]


# ---- what is given ---------------------------------------------------------------------------------------------------


class Classifier(LightningModule):
    """The module that the pages call `model`: an encoder and a head, which log what the pages monitor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0))
        self.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def _evaluate(self, name: str, batch: list[Tensor]) -> None:
        x, y = batch
        logits = self(x)
        self.log_dict({f"{name}_loss": cross_entropy(logits, y), f"{name}_acc": (logits.argmax(1) == y).float().mean()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Data(LightningDataModule):
    """The loaders: three classes, of which some labels are wrong; 64 batches for training, and two for the rest."""

    def train_dataloader(self) -> DataLoader[Any]:
        return _loader(0, batches=64, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return _loader(1, batches=2)

    def test_dataloader(self) -> DataLoader[Any]:
        return _loader(2, batches=2)


def _loader(seed: int, batches: int, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * 4, 4, generator=generator)
    y = torch.where(torch.rand(len(x), generator=generator) < 0.2, 0, x[:, :3].argmax(1))
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)


def given() -> dict[str, Any]:
    """Return the names that a page need not define."""
    data = Data()
    return {
        "model": Classifier(),
        "train_loader": data.train_dataloader(),
        "val_loader": data.val_dataloader(),
        "test_loader": data.test_dataloader(),
    }


# ---- running ---------------------------------------------------------------------------------------------------------


def run(page: Path, code: list[Block], names: dict[str, Any]) -> dict[str, Any]:
    """Run Python blocks in their order in one namespace, and return it.

    A Trainer that a block makes and does not use is tried on the model that is given, so that what a callback refuses
    or warns of in a fit is found in an example that shows only the callback.
    """
    with _module(page, names) as namespace:
        for block in code:
            exec(_compiled(page, block), namespace)
            for trainer in [value for value in namespace.values() if isinstance(value, Trainer)]:
                if trainer.state.fn is None:
                    trainer.fit(namespace["model"], namespace["train_loader"], namespace["val_loader"])
        return dict(namespace)


def _compiled(page: Path, block: Block) -> types.CodeType:
    """Compile a block at its lines of the page, so that errors and `inspect.getsource` find them."""
    tree = ast.parse(block.code.replace("lightning.pytorch", PACKAGE), str(page))
    ast.increment_lineno(tree, block.line - 1)
    return compile(tree, str(page), "exec")


@contextmanager
def _module(page: Path, names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Context manager: the namespace of a module of that name, so that classes of the page can be pickled."""
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    vars(module).update(names)
    sys.modules[module.__name__] = module
    try:
        yield vars(module)
    finally:
        del sys.modules[module.__name__]
