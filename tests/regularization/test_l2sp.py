"""The distance from a starting point: its formula, where the start comes from, resumed runs, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader

from lightning_optim import L2SP, Linear, WeightRegularization
from lightning_optim.base import shards
from tests.harness import models, run
from tests.harness.cells import EPOCHS, Cell
from tests.harness.operators import Operators
from tests.harness.process_group import Group
from tests.harness.reference_loop import Formula, Loop, Step, deviation
from tests.lightning import BoringModel, ModelCheckpoint, Trainer

SHAPES = [(), (5,), (3, 4), (2, 3, 5), (3, 2, 2, 4), (0, 3), (600, 500), *[(3, 4)] * 10]


class Holder(nn.Module):
    """Module with weights of given values."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [torch.randn(shape, generator=generator, dtype=wide).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_are_those_of_autograd(dtype: torch.dtype, weighted: bool) -> None:
    starts, leaves = tensors(0, dtype), [one.requires_grad_() for one in tensors(1, dtype)]
    module = Holder(starts)
    names = [name for name, _ in module.named_parameters()]
    factors = [one.abs() for one in tensors(2)] if weighted else [torch.ones(shape) for shape in SHAPES]
    penalty = L2SP(0.3, importance=dict(zip(names, factors, strict=True)) if weighted else None, on="*")
    penalty.name_weights(module)
    live = list(module.parameters())
    assert penalty.value(live).item() == 0.0
    with torch.no_grad():
        for weight, leaf in zip(live, leaves, strict=True):
            weight.copy_(leaf)
    parts = [
        ((leaf - w0).abs().square() * f).sum() for leaf, w0, f in zip(leaves, tensors(0, dtype), factors, strict=True)
    ]
    wanted = 0.3 * torch.stack(parts).sum()
    slopes = torch.autograd.grad(wanted, leaves)
    torch.testing.assert_close(penalty.value(live).detach(), wanted.detach(), rtol=1e-12, atol=0.0)
    grads = [torch.ones_like(leaf) for leaf in leaves]
    penalty.add_grad_(live, grads)
    for grad, slope in zip(grads, slopes, strict=True):
        torch.testing.assert_close(grad, slope + 1.0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_right_to_rounding(dtype: torch.dtype) -> None:
    """Also where the importance alone would vanish in half precision."""
    start, now = torch.randn(50, 40).to(dtype), torch.randn(50, 40).to(dtype)
    module = Holder([start.clone()])
    penalty = L2SP(1e9, importance={"weights.0": torch.full((50, 40), 1e-9)})
    penalty.name_weights(module)
    (weight,) = module.parameters()
    assert penalty.value([weight]).dtype == torch.float32
    weight.data.copy_(now)
    moved = now.double() - start.double()
    assert penalty.value([weight]).item() == pytest.approx(moved.square().sum().item(), rel=1e-5)
    grad = torch.zeros_like(weight)
    penalty.add_grad_([weight], [grad])
    assert ((grad.double() - 2.0 * moved).abs() <= 4 * torch.finfo(dtype).eps * moved.abs().clamp(min=1.0)).all()


def test_nothing_to_penalize() -> None:
    L2SP(1.0).add_grad_([], [])
    assert L2SP(1.0).value([]).item() == 0.0


@pytest.mark.parametrize("shapes", [[(1_000_000,)], [(500, 100)] * 20], ids=["one large", "many small"])
def test_no_temporary_has_the_size_of_the_model(shapes: list[tuple[int, ...]]) -> None:
    weights, grads, penalty = [torch.ones(s) for s in shapes], [torch.zeros(s) for s in shapes], L2SP(0.1)
    penalty.add_grad_(weights, grads)  # keeps the starting point
    with Operators() as operators:
        penalty.add_grad_(weights, grads)
    assert 0 < operators.peak <= 3 << 18


def test_the_start_is_that_of_the_fit_while_a_schedule_is_zero() -> None:
    weight = torch.ones(2, 2)
    penalty = L2SP(Linear(0.0, 1.0))
    penalty.add_grad_([weight], [torch.zeros(2, 2)], step=0, total=3)
    weight += 1.0
    grad = torch.zeros(2, 2)
    penalty.add_grad_([weight], [grad], step=2, total=3)
    assert torch.equal(grad, torch.full((2, 2), 2.0))


# ---- where the start comes from --------------------------------------------------------------------------------------


class Net(BoringModel):
    """Module with an encoder and a head, and a checkpoint after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return equal batches, so that a resumed run reads what it would have read."""
        return DataLoader([torch.linspace(-1.0, 1.0, 32)] * 8, batch_size=1)  # type: ignore[arg-type]


def trained(model: Net, term: L2SP, steps: int, ckpt_path: str | None = None, folder: Path | None = None) -> Trainer:
    saving = (
        [] if folder is None else [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")]
    )
    trainer = Trainer(
        max_steps=steps,
        logger=False,
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WeightRegularization(term), *saving],
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


STRONG = 3.0  # lr * 2 * strength is 0.6: a few steps lead to where it pulls


@pytest.mark.parametrize("how", ["path", "state_dict", "dictionary"])
def test_a_reference_is_where_it_pulls(how: str, tmp_path: Path) -> None:
    other = net(1)
    saver = Trainer(logger=False, enable_progress_bar=False, barebones=False, max_steps=0)
    saver.strategy.connect(other)
    path = tmp_path / "before.ckpt"
    if how == "path":
        saver.save_checkpoint(path)
    else:
        torch.save(other.state_dict(), path)
    reference: Any = other.state_dict() if how == "dictionary" else path if how == "path" else str(path)
    model = net(0)
    before = (model.layer.weight - other.layer.weight).norm().item()
    trained(model, L2SP(STRONG, reference=reference, on="layer.weight"), steps=8)
    assert (model.layer.weight - other.layer.weight).norm().item() < 0.1 * before


def test_what_the_reference_lacks_is_pulled_to_its_start() -> None:
    reference = {"layer.weight": torch.zeros(2, 32)}
    model, free = net(), net()
    head = model.head.weight.detach().clone()
    trained(model, L2SP(STRONG, reference=reference), steps=8)
    trained(free, L2SP(0.0), steps=8)
    assert model.layer.weight.norm() < 0.2 * free.layer.weight.norm()
    assert (model.head.weight - head).norm() < 0.5 * (free.head.weight - head).norm()


def test_the_second_fit_pulls_to_its_own_start() -> None:
    """With gradients of zero the weights stay where they are, if it pulls to there."""
    callback = WeightRegularization(L2SP(STRONG, on="layer.weight"))
    model = net()
    nn.init.zeros_(model.head.weight).requires_grad_(False)
    for seed in (0, 1):
        with torch.no_grad():
            model.layer.weight.normal_(generator=torch.Generator().manual_seed(seed))
        start = model.layer.weight.detach().clone()
        Trainer(max_steps=3, barebones=True, callbacks=[callback]).fit(model)
        assert torch.equal(model.layer.weight, start)


@pytest.mark.parametrize("reference", [None, "file"])
def test_a_resumed_run_pulls_to_the_first_start(reference: str | None, tmp_path: Path) -> None:
    path = None
    if reference:
        path = tmp_path / "reference.pt"
        torch.save(net(5).state_dict(), path)
    whole, parts = net(), net()
    trained(whole, L2SP(0.5, reference=path), steps=6)
    trained(parts, L2SP(0.5, reference=path), steps=3, folder=tmp_path)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    state = next(value for key, value in saved["callbacks"].items() if "WeightRegularization" in key)
    assert "layer.weight" in str(state), "the start is saved by name"
    resumed = net(7)
    trained(resumed, L2SP(0.5, reference=path), steps=6, ckpt_path=str(tmp_path / "step=3.ckpt"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_a_resumed_run_needs_no_file(tmp_path: Path) -> None:
    """The start is in the checkpoint; the file of the reference may be gone."""
    path = tmp_path / "reference.pt"
    torch.save(net(5).state_dict(), path)
    trained(net(), L2SP(0.5, reference=path), steps=3, folder=tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="is no file"):
        trained(net(), L2SP(0.5, reference=path), steps=3)
    trained(net(), L2SP(0.5, reference=path), steps=6, ckpt_path=str(tmp_path / "step=3.ckpt"))


class Thawing(Net):
    """The layer is frozen in the first epoch."""

    def on_train_epoch_start(self) -> None:
        self.layer.requires_grad_(self.current_epoch > 0)


def test_a_layer_that_is_unfrozen_is_pulled_to_the_reference() -> None:
    torch.manual_seed(0)
    model = Thawing()
    term = L2SP(STRONG, reference={"layer.weight": torch.zeros(2, 32)}, on="layer.weight")
    start = model.layer.weight.detach().clone()
    Trainer(max_epochs=2, limit_train_batches=6, barebones=True, callbacks=[WeightRegularization(term)]).fit(model)
    assert model.layer.weight.norm() < 0.3 * start.norm()


def test_a_compiled_model_has_the_same_names(tmp_path: Path) -> None:
    compiled = torch.compile(net(1))
    path = tmp_path / "compiled.pt"
    torch.save(compiled.state_dict(), path)  # its names begin with _orig_mod.
    model = net(0)
    trained(model, L2SP(STRONG, reference=path, on="layer.weight"), steps=8)
    assert (model.layer.weight - net(1).layer.weight).norm() < 0.3


def test_copies_share_what_was_given() -> None:
    reference = {"layer.weight": torch.zeros(2, 32)}
    term = L2SP(1.0, reference=reference, importance={"layer.weight": torch.ones(2, 32)}, on="layer.weight")
    twin = copy.deepcopy(term)
    assert twin.reference is reference and twin.importance is term.importance
    assert twin.start is not term.start
    assert (
        repr(twin)
        == repr(term)
        == ("L2SP(1.0, reference={'layer.weight': <Tensor>}, importance={'layer.weight': <Tensor>}, on='layer.weight')")
    )
    # The lines at the start of a fit have no room for all names.
    assert term.in_words == "L2SP(1.0, reference={1 tensors}, importance={1 tensors}, on='layer.weight')"
    loaded = pickle.loads(pickle.dumps(term))
    assert torch.equal(loaded.reference["layer.weight"], reference["layer.weight"])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"reference": 3}, "`reference` must be a dictionary of parameter name to tensor, the path of a checkpoint"),
        ({"reference": {}}, r"`reference` must be .*, got {}"),
        ({"reference": {"a": 3}}, r"`reference` must be .*, got {'a': 3}"),
        ({"importance": "fisher.pt"}, "`importance` must be a dictionary of parameter name to tensor or None, got"),
        ({"importance": {"a": torch.tensor([-1.0])}}, "`importance` must hold numbers >= 0, got .* for 'a'"),
        ({"importance": {"a": torch.tensor([float("nan")])}}, "`importance` must hold numbers >= 0, got .* for 'a'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        L2SP(0.1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"reference": {"net.layer.weight": torch.zeros(2, 32)}}, "has none of the chosen parameters: rename its keys"),
        ({"reference": {"layer.weight": torch.zeros(2, 3)}}, r"of shape \(2, 3\) for .*'layer.weight'.*`exclude`"),
        ({"importance": {"layer.weight": torch.zeros(2, 32)}}, "no tensor for the parameter 'head.weight'.*`exclude`"),
        ({"importance": {"layer.weight": torch.zeros(1, 32)}}, r"of shape \(1, 32\) for the parameter 'layer.weight'"),
        ({"reference": "nowhere.ckpt"}, "nowhere.ckpt'` is no file: pass the path of a single-file checkpoint"),
        ({"reference": "."}, "is a folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(arguments: dict[str, Any], sentence: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=sentence):
        trained(model, L2SP(0.1, **arguments), steps=1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Secret:
    """A class that a file must not be able to make."""


@pytest.mark.parametrize(
    "content", [Secret(), [1, 2], {"state_dict": 3}, "", "hello"], ids=["object", "list", "number", "empty", "text"]
)
def test_files_that_are_no_checkpoint(content: Any, tmp_path: Path) -> None:
    if isinstance(content, str):
        (tmp_path / "file.pt").write_text(content)
    else:
        torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"cannot be read as tensors|and no dictionary|has none of the chosen"):
        trained(net(), L2SP(0.1, reference=tmp_path / "file.pt"), steps=1)


def test_names_are_needed() -> None:
    weight = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"call `name_weights\(module\)` before"):
        L2SP(0.1, reference={"weight": weight}).value([weight])


# ---- shards ----------------------------------------------------------------------------------------------------------


def errors_on_shards() -> list[float]:
    """Return the errors of value and gradients of shards against whole tensors, without and with importance."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    how = [Shard(0), Shard(0), Shard(1), Replicate(), None]
    shapes = [(5, 3), (1,), (4, 3), (6,), (7,)]
    starts, nows, factors = ([torch.rand(shape, generator=generator) for shape in shapes] for _ in range(3))
    far = []
    for given in ({}, {"importance": {f"weights.{place}": one for place, one in enumerate(factors)}}):
        results = []
        for placements in (how, [None] * 5):
            pairs = list(zip(placements, starts, nows, strict=True))
            module = Holder([w.clone() if p is None else distribute_tensor(w, mesh, [p]) for p, w, _ in pairs])
            penalty = L2SP(
                0.7, reference={f"weights.{place}": one for place, one in enumerate(starts)}, on="*", **given
            )
            penalty.name_weights(module)
            live = list(module.parameters())
            for weight, (_, _, now) in zip(live, pairs, strict=True):
                shards.copy_(weight, now)
            grads = [torch.ones_like(weight) for weight in live]
            penalty.add_grad_(live, grads)
            results.append([penalty.value(live).detach(), *(shards.gather_to_cpu(grad) for grad in grads)])
        far += [(one - other).abs().max().item() for one, other in zip(*results, strict=True)]
    return far


def test_exact_on_shards(group: Group) -> None:
    first, second = group.run(errors_on_shards)
    assert len(first) == 12
    assert max(first + second) < 1e-5


def fit_with_tensors(cell: Cell) -> dict[str, Tensor]:
    """Train a cell with a reference and with importance, both by name, and return its weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: weight.shape for name, weight in models.Model(cell).named_parameters()}
    reference = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    importance = {name: 8.0 * torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    term = L2SP(0.5, reference=reference, importance=importance, on="*")
    return run.fit(cell, [WeightRegularization(term)]).final


class PullByName(Formula):
    """Add the gradient of what :func:`fit_with_tensors` penalizes, one tensor after another."""

    def __init__(self, cell: Cell) -> None:
        generator = torch.Generator().manual_seed(0)
        named = list(models.Model(cell).named_parameters())
        self.starts = {name: 0.3 * torch.randn(weight.shape, generator=generator) for name, weight in named}
        self.factors = {name: 8.0 * torch.rand(weight.shape, generator=generator) for name, weight in named}
        self.prefixes = {index: f"net.{index}." if cell.optimizers > 1 else "net." for index in range(cell.optimizers)}

    def before_step(self, step: Step) -> None:
        for name, weight, grad in zip(step.names, step.weights, step.grads, strict=True):
            full = name if name in self.starts else self.prefixes[step.optimizer] + name
            grad += 2.0 * 0.5 * self.factors[full] * (weight - self.starts[full])


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["automatic", "two"])
def test_a_fit_with_reference_and_importance_is_that_of_the_formula(kind: str, strategy: str, group: Group) -> None:
    cell = Cell(kind, "32-true", strategy, "1")  # type: ignore[arg-type]
    wanted = Loop(cell.whole, PullByName(cell), (), EPOCHS).run().final
    for found in [fit_with_tensors(cell)] if strategy == "single" else group.run(fit_with_tensors, cell):
        assert max(deviation(found, wanted).values()) < cell.tolerance
