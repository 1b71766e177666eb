"""Make a trained network better: Lightning callbacks and mixins, which are the public names here."""

from lightning_optim.averaging.averages.average import Average as Average
from lightning_optim.averaging.averages.ema import EMA as EMA
from lightning_optim.averaging.averages.lawa import LAWA as LAWA
from lightning_optim.averaging.averages.swa import SWA as SWA
from lightning_optim.averaging.batchnorm.statistics import refresh_batchnorm_ as refresh_batchnorm_
from lightning_optim.averaging.checkpoint_averaging import CheckpointAveraging as CheckpointAveraging
from lightning_optim.averaging.checkpoints.average_checkpoints import average_checkpoints as average_checkpoints
from lightning_optim.averaging.checkpoints.average_checkpoints import average_weights as average_weights
from lightning_optim.averaging.checkpoints.averaged_state_dict import averaged_state_dict as averaged_state_dict
from lightning_optim.averaging.checkpoints.soup import greedy_soup as greedy_soup
from lightning_optim.averaging.ema_weight_averaging import EMAWeightAveraging as EMAWeightAveraging
from lightning_optim.averaging.stochastic_weight_averaging import StochasticWeightAveraging as StochasticWeightAveraging
from lightning_optim.averaging.weight_averaging import WeightAveraging as WeightAveraging
from lightning_optim.base.policy import Policy as Policy
from lightning_optim.base.public_names import publish
from lightning_optim.base.schedules import Constant as Constant
from lightning_optim.base.schedules import Cosine as Cosine
from lightning_optim.base.schedules import Exponential as Exponential
from lightning_optim.base.schedules import Linear as Linear
from lightning_optim.base.schedules import Piecewise as Piecewise
from lightning_optim.base.schedules import Schedule as Schedule
from lightning_optim.ensembling.cost_benefit import cost_benefit as cost_benefit
from lightning_optim.ensembling.diversity import Disagreement as Disagreement
from lightning_optim.ensembling.ensemble import Ensemble as Ensemble
from lightning_optim.ensembling.fit_members import fit_members as fit_members
from lightning_optim.gradients.clipping.agc import AGC as AGC
from lightning_optim.gradients.clipping.autoclip import AutoClip as AutoClip
from lightning_optim.gradients.clipping.by_norm import ClipByNorm as ClipByNorm
from lightning_optim.gradients.clipping.by_value import ClipByValue as ClipByValue
from lightning_optim.gradients.clipping.centralize import Centralize as Centralize
from lightning_optim.gradients.clipping.clipping_policy import Clipping as Clipping
from lightning_optim.gradients.clipping.noise import Noise as Noise
from lightning_optim.gradients.clipping.norm_clipping_policy import NormClipping as NormClipping
from lightning_optim.gradients.clipping.zclip import ZClip as ZClip
from lightning_optim.gradients.gradient_accumulation import GradientAccumulation as GradientAccumulation
from lightning_optim.gradients.gradient_clipping import GradientClipping as GradientClipping
from lightning_optim.gradients.gradient_monitor import GradientMonitor as GradientMonitor
from lightning_optim.gradients.manual_optimization import ManualOptimizationMixin as ManualOptimizationMixin
from lightning_optim.gradients.sharpness_aware import SharpnessAwareMixin as SharpnessAwareMixin
from lightning_optim.gradients.target_batch_size import TargetBatchSize as TargetBatchSize
from lightning_optim.regularization.activation_regularization import (
    ActivationRegularization as ActivationRegularization,
)
from lightning_optim.regularization.dropout.drop_block import DropBlock as DropBlock
from lightning_optim.regularization.dropout.drop_path import DropPath as DropPath
from lightning_optim.regularization.dropout.scheduled_dropout import ScheduledDropout as ScheduledDropout
from lightning_optim.regularization.dropout.weight_drop import WeightDrop as WeightDrop
from lightning_optim.regularization.fisher_importance import fisher_importance as fisher_importance
from lightning_optim.regularization.flooding import Flooding as Flooding
from lightning_optim.regularization.penalties.elementwise import L1 as L1
from lightning_optim.regularization.penalties.elementwise import L2 as L2
from lightning_optim.regularization.penalties.elementwise import ElasticNet as ElasticNet
from lightning_optim.regularization.penalties.group_lasso import GroupLasso as GroupLasso
from lightning_optim.regularization.penalties.l2sp import L2SP as L2SP
from lightning_optim.regularization.penalties.orthogonal import Orthogonal as Orthogonal
from lightning_optim.regularization.penalties.penalty import Penalty as Penalty
from lightning_optim.regularization.projections.non_negative import NonNegative as NonNegative
from lightning_optim.regularization.projections.norm_bounds import MaxNorm as MaxNorm
from lightning_optim.regularization.projections.norm_bounds import UnitNorm as UnitNorm
from lightning_optim.regularization.projections.proximal import Proximal as Proximal
from lightning_optim.regularization.projections.proximal_group_lasso import ProximalGroupLasso as ProximalGroupLasso
from lightning_optim.regularization.projections.proximal_l1 import ProximalL1 as ProximalL1
from lightning_optim.regularization.projections.weight_decay import WeightDecay as WeightDecay
from lightning_optim.regularization.regularization_mixin import RegularizationMixin as RegularizationMixin
from lightning_optim.regularization.sparsity_table import sparsity as sparsity
from lightning_optim.regularization.weight_regularization import WeightRegularization as WeightRegularization
from lightning_optim.resume.exact_resume import ExactResume as ExactResume
from lightning_optim.runtime.callback import OptimCallback as OptimCallback
from lightning_optim.runtime.evaluated_weights import evaluated_state as evaluated_state
from lightning_optim.runtime.order import Slot as Slot
from lightning_optim.runtime.step import OptimizerStep as OptimizerStep
from lightning_optim.runtime.step import drop_step as drop_step
from lightning_optim.runtime.step import gradients_of as gradients_of
from lightning_optim.runtime.step import total_steps as total_steps
from lightning_optim.stopping.combined_criteria import AllOf as AllOf
from lightning_optim.stopping.combined_criteria import AnyOf as AnyOf
from lightning_optim.stopping.combined_criteria import AtLeast as AtLeast
from lightning_optim.stopping.criteria import Criterion as Criterion
from lightning_optim.stopping.criteria import Divergence as Divergence
from lightning_optim.stopping.criteria import NonFinite as NonFinite
from lightning_optim.stopping.criteria import Plateau as Plateau
from lightning_optim.stopping.criteria import Threshold as Threshold
from lightning_optim.stopping.early_stopping import EarlyStopping as EarlyStopping
from lightning_optim.version import installed_version as _installed_version

__version__ = _installed_version()
__all__ = publish(globals())
