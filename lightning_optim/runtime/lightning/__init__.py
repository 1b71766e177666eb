"""Hold all that depends on Lightning, its version, or a private name of Lightning, torch or torchmetrics.

Only this folder imports Lightning; the rest of the package imports Lightning's public names from here. A private name
is used in one function of one of these files, and is listed in the table of ``private_names.py``. A test of each says
which name a new version has changed:

* ``loops.py``: batches, windows and steps of a running fit; ``data_loading.py``: its loaders and their positions;
* ``logger_connector.py``: what was logged; ``log_interception.py``: mute, tap or collect what a step logs;
* ``modules.py``: a LightningModule; ``strategies.py``, ``precision.py``, ``pruning.py``, ``metrics.py``;
* ``torch_internals.py`` and ``spectral_norm.py``: parts of torch that are not public.
"""

# ruff: noqa: I001 (in groups, by what they are)

# Names that users write
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger

# Callbacks that ours derive from, or look for
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason

# Strategies, and how checkpoints are written
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    XLAStrategy,
)

# The rest
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_prefixed_message, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
