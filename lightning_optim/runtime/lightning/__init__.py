"""Hold all that depends on Lightning, its version or its packages, or on a private name of torch or torchmetrics.

The rest of the package takes the names of Lightning's classes from here. Each stands for the class of that name in
every package that the user has imported, ``lightning.pytorch`` or ``pytorch_lightning``. Neither is imported here:

* ``packages.py`` finds classes and functions in the packages; ``base_classes.py`` has bases that belong to both;
* ``rank_zero.py``: warn and log on the first rank.

A private name is used in one function of one of these files, and is listed in the table of ``private_names.py``. A test
of each says which name a new version has changed:

* ``loops.py``: batches, windows and steps of a running fit; ``data_loading.py``: its loaders and their positions;
* ``logger_connector.py``: what was logged; ``log_interception.py``: mute, tap or collect what a step logs;
* ``modules.py``: a LightningModule; ``loading.py``: one from a checkpoint;
* ``strategies.py``, ``precision.py``, ``pruning.py``, ``stopping.py``, ``metrics.py``;
* ``torch_internals.py`` and ``spectral_norm.py``: parts of torch that are not public.
"""

from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_prefixed_message

from lightning_optim.runtime.lightning.base_classes import (
    CallbackBase,
    EarlyStoppingBase,
    MisconfigurationException,
    ModuleMixin,
)
from lightning_optim.runtime.lightning.packages import stand_in
from lightning_optim.runtime.lightning.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import (
        EarlyStopping,
        GradientAccumulationScheduler,
        ModelCheckpoint,
        ModelPruning,
        ModelSummary,
        StochasticWeightAveraging,
        WeightAveraging,
    )
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.plugins import CheckpointIO
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        ParallelStrategy,
        Strategy,
        XLAStrategy,
    )
    from lightning.pytorch.utilities import CombinedLoader
else:
    Callback = stand_in("Callback")
    LightningDataModule = stand_in("LightningDataModule")
    LightningModule = stand_in("LightningModule")
    Trainer = stand_in("Trainer")

    EarlyStopping = stand_in("EarlyStopping", "callbacks")
    GradientAccumulationScheduler = stand_in("GradientAccumulationScheduler", "callbacks")
    ModelCheckpoint = stand_in("ModelCheckpoint", "callbacks")
    ModelPruning = stand_in("ModelPruning", "callbacks")
    ModelSummary = stand_in("ModelSummary", "callbacks")
    StochasticWeightAveraging = stand_in("StochasticWeightAveraging", "callbacks")
    WeightAveraging = stand_in("WeightAveraging", "callbacks")

    LightningOptimizer = stand_in("LightningOptimizer", "core.optimizer")
    Logger = stand_in("Logger", "loggers")
    CheckpointIO = stand_in("CheckpointIO", "plugins")
    AsyncCheckpointIO = stand_in("AsyncCheckpointIO", "plugins.io")
    CombinedLoader = stand_in("CombinedLoader", "utilities")

    DDPStrategy = stand_in("DDPStrategy", "strategies")
    DeepSpeedStrategy = stand_in("DeepSpeedStrategy", "strategies")
    FSDPStrategy = stand_in("FSDPStrategy", "strategies")
    ModelParallelStrategy = stand_in("ModelParallelStrategy", "strategies")
    ParallelStrategy = stand_in("ParallelStrategy", "strategies")
    Strategy = stand_in("Strategy", "strategies")
    XLAStrategy = stand_in("XLAStrategy", "strategies")
