"""Both of Lightning's packages in one process: each script runs in a process of its own, which imports what it says."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import lightning_optim
from lightning_optim import Ensemble, ManualOptimizationMixin, RegularizationMixin, SharpnessAwareMixin
from lightning_optim.runtime import random_state
from lightning_optim.runtime.lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_optim.runtime.lightning.modules import HPARAMS, HPARAMS_NAME, HPARAMS_TYPE
from lightning_optim.runtime.lightning.packages import package_of, version_of
from tests import lightning
from tests.lightning import PACKAGE, BoringModel, seed_everything

ROOT = Path(lightning_optim.__file__).parents[1]
needs_both = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("lightning", "pytorch_lightning")),
    reason="only one of the packages is installed",
)


def run(script: str, *arguments: str) -> str:
    """Run a script and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_imports_neither() -> None:
    run(
        """
        import importlib, pkgutil, sys
        import lightning_optim

        for module in pkgutil.walk_packages(lightning_optim.__path__, "lightning_optim."):
            importlib.import_module(module.name)
        found = {name.partition(".")[0] for name in sys.modules}
        assert not found & {"lightning", "pytorch_lightning", "lightning_fabric"}, found
        """
    )


ORDERS = [
    ("lightning_optim", "lightning.pytorch", "pytorch_lightning"),
    ("pytorch_lightning", "lightning_optim", "lightning.pytorch"),
    ("lightning.pytorch", "pytorch_lightning", "lightning_optim"),
]


YAML = """
seed_everything: false
trainer:
  logger: false
  callbacks:
  - class_path: lightning_optim.EarlyStopping
    init_args: {monitor: val_loss, patience: 7}
  - class_path: lightning_optim.WeightAveraging
    init_args: {average: {class_path: lightning_optim.EMA, init_args: {decay: 0.9}}}
"""


@needs_both
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_one_class_belongs_to_both_packages_in_any_order_of_imports(order: tuple[str, ...], tmp_path: Path) -> None:
    """Objects that were made before a package is imported are instances of its classes too."""
    (tmp_path / "config.yaml").write_text(YAML)
    run(
        """
        import copy, importlib, pickle, sys

        made = []
        for name in sys.argv[2:]:
            importlib.import_module(name)
            if ours := sys.modules.get("lightning_optim"):
                made += [ours.EarlyStopping("loss", patience=7), ours.GradientClipping(1.0)]
        import lightning.pytorch as first, pytorch_lightning as second

        for package in (first, second):
            # The command line comes first: its parser knows only the classes.
            boring = importlib.import_module(package.__name__ + ".demos.boring_classes")
            CLI = importlib.import_module(package.__name__ + ".cli").LightningCLI
            cli = CLI(boring.BoringModel, run=False, args=["--config", sys.argv[1]])
            assert cli.trainer.early_stopping_callback.patience == 7

            quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
            for callback in made:
                assert isinstance(callback, package.Callback)
                twin = pickle.loads(pickle.dumps(copy.deepcopy(callback)))
                assert type(twin) is type(callback) and twin.state_key == callback.state_key
            for stop in made[::2]:
                assert isinstance(stop, package.callbacks.EarlyStopping)
                assert package.Trainer(callbacks=[stop], **quiet).early_stopping_callback is stop
            theirs = package.utilities.exceptions.MisconfigurationException
            from lightning_optim.runtime.lightning import MisconfigurationException
            try:
                raise MisconfigurationException("a sentence")
            except theirs as error:
                assert str(error) == "a sentence"
        """,
        str(tmp_path / "config.yaml"),
        *order,
    )


FITS = """
import importlib, tempfile, torch
from torch import nn
import lightning_optim as lo
import lightning.pytorch, pytorch_lightning

PACKAGES = (lightning.pytorch, pytorch_lightning)

def data(seed):
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), 4)

def callbacks():
    return [
        lo.GradientAccumulation(2), lo.WeightRegularization([lo.L2(1e-3), lo.ProximalL1(1e-4)]), lo.GradientMonitor(),
        lo.GradientClipping(0.5), lo.ScheduledDropout({"*": lo.Linear(0.1, 0.3)}), lo.WeightAveraging(lo.EMA(0.9)),
        lo.EarlyStopping("val_loss", patience=float("inf")), lo.ExactResume(),
    ]

def module_of(package):
    class Net(lo.RegularizationMixin, package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
        def forward(self, x):
            return self.net(x)
        def regularization(self, batch, outputs):
            return 1e-3 * outputs.abs().mean()
        def training_step(self, batch, batch_idx):
            outputs = self(batch[0])
            return (outputs - batch[1]).square().mean() + self.regularization_loss(batch, outputs)
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())
        def test_step(self, batch, batch_idx):
            self.log("test_loss", (self(batch[0]) - batch[1]).square().mean())
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)
    return Net()

def trainer_of(package, folder=None, ours=(), **options):
    saver = [package.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else []
    return package.Trainer(callbacks=[*ours, *saver], logger=False, accelerator="cpu", devices=1,
        enable_checkpointing=bool(folder), enable_progress_bar=False, enable_model_summary=False, **options)

def fit(package, folder=None, resume=None):
    torch.manual_seed(0)
    module, ours = module_of(package), callbacks()
    trainer = trainer_of(package, folder, ours, max_epochs=3)
    trainer.fit(module, data(0), data(1), ckpt_path=resume)
    assert trainer.early_stopping_callback is ours[-2]
    assert ours[-2].stopping_reason.name == "NOT_STOPPED"
    if hasattr(package.callbacks.early_stopping, "EarlyStoppingReason"):
        assert ours[-2].stopping_reason is package.callbacks.early_stopping.EarlyStoppingReason.NOT_STOPPED
    return {name: value.clone() for name, value in module.state_dict().items()}, module

def same(ones, others):
    assert ones.keys() == others.keys()
    assert all(torch.equal(one, other) for one, other in zip(ones.values(), others.values()))
"""


@needs_both
def test_techniques_give_the_same_numbers_runs_resume_in_the_other_package_and_mixins_work() -> None:
    run(
        FITS
        + """
whole = [fit(package)[0] for package in PACKAGES]
same(*whole)
for package, other in (PACKAGES, PACKAGES[::-1]):
    with tempfile.TemporaryDirectory() as folder:
        fit(package, folder)
        same(fit(package, resume=folder + "/epoch=1.ckpt")[0], whole[0])
        same(fit(other, resume=folder + "/epoch=1.ckpt")[0], whole[0])

class Twice(lo.ManualOptimizationMixin):
    automatic_optimization = False
    def training_step(self, batch, batch_idx):
        self.optimize(self.layer(batch).square().mean(), self.optimizers())

for package in PACKAGES:
    Boring = importlib.import_module(package.__name__ + ".demos.boring_classes").BoringModel
    for mixin in (lo.SharpnessAwareMixin, lo.RegularizationMixin, Twice):
        module = type("Module", (mixin, Boring), {"automatic_optimization": mixin is not Twice})()
        trainer = trainer_of(package, max_steps=3, limit_val_batches=0)
        trainer.fit(module)
        assert trainer.global_step == 3
"""
    )


@needs_both
def test_ensembles_of_each_package() -> None:
    """Members are fitted, combined, tested and measured."""
    run(
        FITS
        + """
for package in PACKAGES:
    with tempfile.TemporaryDirectory() as folder:
        paths = lo.fit_members(
            lambda index: module_of(package), 2, lambda index: trainer_of(package, max_epochs=1), data(0),
            dirpath=folder, seed=3)
        ensemble = lo.Ensemble.from_checkpoints(type(module_of(package)), paths, outputs="values")
        assert isinstance(ensemble, package.LightningModule) and isinstance(ensemble, lo.Ensemble)
        (tested,) = trainer_of(package).test(ensemble, data(1), verbose=False)
        mean = sum(member(data(1).dataset.tensors[0]) for member in ensemble.members) / 2
        assert torch.allclose(ensemble(data(1).dataset.tensors[0]), mean)
        table = lo.cost_benefit(ensemble, trainer_of(package), data(1), monitor="val_loss")
        assert [row.members for row in table.rows] == [1, 2]
"""
    )


@needs_both
def test_a_subclass_of_a_user_may_derive_from_a_package_too() -> None:
    run(
        """
        import lightning_optim as lo
        import lightning.pytorch as first

        class Timed(lo.EMAWeightAveraging, first.callbacks.Timer):
            def __init__(self):
                lo.EMAWeightAveraging.__init__(self)
                first.callbacks.Timer.__init__(self, duration="00:01:00:00")

        timed = Timed()
        import pytorch_lightning as second
        assert isinstance(timed, second.Callback) and isinstance(timed, first.callbacks.Timer)
        assert isinstance(Timed(), second.Callback)

        class Impatient(second.callbacks.EarlyStopping):
            def _evaluate_stopping_criteria(self, current):
                return True, "impatient"

        class Mine(lo.EarlyStopping, Impatient):
            pass

        try:
            Mine("loss").setup(first.Trainer(barebones=True), None, "fit")
        except first.utilities.exceptions.MisconfigurationException as error:
            assert "Mine overrides ['_evaluate_stopping_criteria']" in str(error)
        else:
            raise AssertionError
        """
    )


@needs_both
@pytest.mark.skipif(version_of(lightning.Trainer) < (2, 6), reason="the Trainer takes objects of its own class alone")
def test_callbacks_of_the_other_package_are_seen_beside_ours() -> None:
    """A Trainer lists only those of its own package in ``checkpoint_callbacks`` and ``early_stopping_callbacks``."""
    run(
        FITS
        + """
for package, other in (PACKAGES, PACKAGES[::-1]):
    with tempfile.TemporaryDirectory() as folder:
        theirs = [
            other.callbacks.ModelCheckpoint(folder, monitor="val_loss", save_top_k=2),
            other.callbacks.EarlyStopping("val_loss", patience=0, min_delta=1e9),
        ]
        ours = [lo.CheckpointAveraging(top=2), lo.EarlyStopping("val_loss", name="ours", restore_best=False)]
        trainer = trainer_of(package, ours=[*theirs, *ours], max_epochs=9, min_epochs=3)
        trainer.fit(module_of(package), data(0), data(1))
        assert trainer.current_epoch == 3 and len(theirs[0].best_k_models) == 2

    # Ours asks to stop, then theirs does; ours withdraws when the metric improves, and the stop of theirs stands.
    module, scores = module_of(package), [1.0, 2.0, 2.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    module.validation_step = lambda batch, batch_idx: module.log("val_loss", scores[module.current_epoch])
    theirs = other.callbacks.EarlyStopping("val_loss", patience=2)
    stops = [theirs, lo.EarlyStopping("val_loss", patience=1, name="ours")]
    trainer = trainer_of(package, ours=stops, max_epochs=9, min_epochs=5, num_sanity_val_steps=0)
    trainer.fit(module, data(0), data(1))
    assert trainer.current_epoch == 5
"""
    )


@needs_both
@pytest.mark.skipif(version_of(lightning.Trainer) < (2, 6), reason="the Trainer takes objects of its own class alone")
def test_a_package_that_was_imported_past_the_import_system_is_joined_in_a_fit() -> None:
    run(
        """
        import sys
        import lightning_optim as lo

        sys.meta_path[:] = [finder for finder in sys.meta_path if "lightning_optim" not in type(finder).__module__]
        from lightning.pytorch import Callback, Trainer
        from lightning.pytorch.demos.boring_classes import BoringModel

        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        clipping = lo.GradientClipping(1.0)
        assert not isinstance(clipping, Callback)
        try:
            Trainer(callbacks=[clipping], gradient_clip_val=1.0, max_steps=1, barebones=True).fit(BoringModel())
        except MisconfigurationException:
            pass
        assert isinstance(clipping, Callback)

        sys.meta_path[:] = [finder for finder in sys.meta_path if "lightning_optim" not in type(finder).__module__]
        from pytorch_lightning import Trainer
        from pytorch_lightning.demos.boring_classes import BoringModel
        from pytorch_lightning.utilities.exceptions import MisconfigurationException

        class Model(lo.SharpnessAwareMixin, BoringModel):
            pass

        try:
            Trainer(accumulate_grad_batches=2, max_steps=2, barebones=True).fit(Model())
        except MisconfigurationException as error:
            assert "remove the accumulation" in str(error)
        """
    )


@needs_both
@pytest.mark.skipif(version_of(lightning.Trainer) < (2, 6), reason="the Trainer takes objects of its own class alone")
def test_a_package_that_is_being_imported_when_ours_is_joins_in_a_fit(tmp_path: Path) -> None:
    """As when a module that Lightning imports, such as a logger's, imports this package."""
    (tmp_path / "tensorboardX.py").write_text("import lightning_optim")
    run(
        """
        import sys

        sys.path.insert(0, sys.argv[1])
        from importlib.machinery import PathFinder
        class First:
            def find_spec(name, path=None, target=None):
                if name == "pytorch_lightning.trainer":
                    import tensorboardX
        sys.meta_path.insert(0, First)
        import pytorch_lightning as package
        from pytorch_lightning.demos.boring_classes import BoringModel

        clipping = sys.modules["lightning_optim"].GradientClipping(1.0)
        package.Trainer(callbacks=[clipping], max_steps=1, barebones=True).fit(BoringModel())
        assert clipping.steps == [1] and isinstance(clipping, package.Callback)
        """,
        str(tmp_path),
    )


def test_a_package_is_joined_beside_other_finders_and_loaders_and_a_mock_is_none(tmp_path: Path) -> None:
    """A small package in the place of Lightning's is imported again and again, as tests of imports do."""
    for name, text in {
        "__init__": "from .callbacks import Callback\nclass LightningModule: ...\nclass Trainer: ...",
        "callbacks": "class Callback: ...\nclass EarlyStopping(Callback): ...",
        "utilities/exceptions": "class MisconfigurationException(Exception): ...",
    }.items():
        (path := tmp_path / "pytorch_lightning" / f"{name}.py").parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    run(
        """
        import contextlib, importlib, sys, zipfile, zipimport
        from importlib.machinery import PathFinder
        from unittest.mock import MagicMock
        import lightning_optim

        folder = sys.argv[1]

        @contextlib.contextmanager
        def finder(instance, place):
            sys.meta_path.insert(place, instance)
            yield
            sys.meta_path.remove(instance)

        class Asking:  # all the others
            def find_spec(self, name, path=None, target=None):
                specs = (other.find_spec(name, path, target) for other in sys.meta_path if other is not self)
                return next((spec for spec in specs if spec is not None), None)

        class OfPython2:
            def find_module(self, name, path=None):
                return None

        class Loader:
            __slots__ = ("create_module", "exec_module")

        class WithoutAttributes:
            def find_spec(self, name, path=None, target=None):
                if name == "pytorch_lightning":
                    spec, loader = PathFinder.find_spec(name, path, target), Loader()
                    loader.create_module, loader.exec_module = spec.loader.create_module, spec.loader.exec_module
                    spec.loader = loader
                    return spec

        def fresh(name):
            for module in [module for module in sys.modules if module.partition(".")[0] == name]:
                del sys.modules[module]
            return importlib.import_module(name)

        def joins():
            package = fresh("pytorch_lightning")
            from lightning_optim.runtime.lightning import Trainer
            assert issubclass(package.Trainer, Trainer)
            return issubclass(sys.modules["lightning_optim"].EarlyStopping, package.callbacks.EarlyStopping)

        sys.path.insert(0, folder)
        assert joins() and joins()
        for instance in (Asking(), OfPython2()):
            for place in (0, 1):
                with finder(instance, place):
                    assert joins()
        with finder(WithoutAttributes(), 0):
            joins()
            class Module(lightning_optim.RegularizationMixin, sys.modules["pytorch_lightning"].LightningModule):
                pass
            assert issubclass(lightning_optim.EarlyStopping, sys.modules["pytorch_lightning"].Callback)

        with zipfile.ZipFile(folder + "/packed.zip", "w") as packed:
            for name in ("__init__", "callbacks", "utilities/exceptions"):
                packed.write(f"{folder}/pytorch_lightning/{name}.py", f"pytorch_lightning/{name}.py")
            packed.writestr("pytorch_lightning/utilities/__init__.py", "")
        sys.path[0] = folder + "/packed.zip"
        assert joins() and isinstance(sys.modules["pytorch_lightning"].__loader__, zipimport.zipimporter)
        sys.path[0] = folder

        sys.modules["pytorch_lightning"] = MagicMock()  # as a builder of documentation does
        assert lightning_optim.EarlyStopping("loss").monitor == "loss"
        lightning_optim.runtime.lightning.base_classes.join_packages()
        assert not isinstance(1, lightning_optim.runtime.lightning.Trainer)

        fresh("lightning_optim")  # its finder comes beside that of the first
        assert joins()
        """,
        str(tmp_path),
    )


def test_warnings_come_on_the_first_rank_of_fabric_too() -> None:
    run(
        """
        import sys, warnings
        from lightning_utilities.core.rank_zero import rank_zero_only
        from lightning_optim.runtime.lightning import rank_zero_warn

        for rank, count in {None: 1, 0: 1, 1: 0}.items():
            if rank is not None:
                rank_zero_only.rank = rank
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                rank_zero_warn("a sentence")
            assert len(caught) == count
        """
    )


@pytest.mark.skipif(importlib.util.find_spec("pytorch_lightning") is None, reason="pytorch_lightning is not installed")
def test_a_parser_knows_the_classes_that_stand_for_lightnings_and_imports_no_package_for_them() -> None:
    pytest.importorskip("jsonargparse")
    run(
        """
        import sys
        from pytorch_lightning.demos.boring_classes import BoringModel
        import lightning_optim as lo

        sys.modules["lightning"] = None  # as if it were not installed
        from jsonargparse import ArgumentParser

        ArgumentParser().add_function_arguments(lo.cost_benefit)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(lo.Ensemble, "ensemble")
        members = [{"class_path": "pytorch_lightning.demos.boring_classes.BoringModel"}] * 2
        parsed = parser.parse_object({"ensemble": {"members": members, "outputs": "values"}})
        ensemble = parser.instantiate_classes(parsed).ensemble
        assert len(ensemble.members) == 2 and isinstance(ensemble, BoringModel)
        """
    )


# ---- in the package of the tests -------------------------------------------------------------------------------------


def test_the_package_of_a_class() -> None:
    assert package_of(lightning.Trainer) == package_of(BoringModel()) == PACKAGE


def test_a_class_that_stands_for_both_is_asked_and_not_derived_from() -> None:
    module = BoringModel()
    assert isinstance(module, LightningModule)
    assert issubclass(BoringModel, LightningModule)
    assert not isinstance(module, Trainer)
    assert issubclass(lightning.MisconfigurationException, Exception)
    assert issubclass(MisconfigurationException, lightning.MisconfigurationException)
    with pytest.raises(TypeError, match="only stands for those of Lightning's packages"):

        class Mine(Callback):
            pass

    with pytest.raises(TypeError, match=r"^list has no base class in lightning\.pytorch or pytorch_lightning$"):
        package_of([])


@pytest.mark.parametrize("mixin", [SharpnessAwareMixin, ManualOptimizationMixin, RegularizationMixin])
def test_a_mixin_that_is_listed_last_is_refused(mixin: type) -> None:
    """Its methods would be hidden by those of LightningModule: the technique would be off, in silence."""
    sentence = rf"^Module lists {mixin.__name__} after its LightningModule.*write `class Module\({mixin.__name__}, …\)`"
    with pytest.raises(TypeError, match=sentence):
        type("Module", (BoringModel, mixin), {})
    assert type("Module", (mixin, BoringModel), {})


def test_the_class_ensemble_is_a_module_of_no_package() -> None:
    assert not issubclass(Ensemble, LightningModule)
    assert isinstance(Ensemble([BoringModel()], outputs="values"), lightning.LightningModule)


def test_keys_of_hyper_parameters_are_lightnings() -> None:
    theirs = lightning.LightningModule
    keys = (
        theirs.CHECKPOINT_HYPER_PARAMS_KEY,
        theirs.CHECKPOINT_HYPER_PARAMS_NAME,
        theirs.CHECKPOINT_HYPER_PARAMS_TYPE,
    )
    assert keys == (HPARAMS, HPARAMS_NAME, HPARAMS_TYPE)


def test_seeds_are_those_of_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> tuple[Any, ...]:
        seeds = {name: os.environ[name] for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
        return random.random(), numpy.random.rand(), float(torch.rand(())), seeds

    with random_state.isolated_random_state():
        random_state.seed_everything(5)
        ours = drawn()
        seed_everything(5, workers=True)
        assert ours == drawn()
