"""Lightning callbacks and mixins that make a trained network better: the public names."""

from lightning_optim.averaging.average import Average
from lightning_optim.averaging.batchnorm.statistics import refresh_batchnorm_
from lightning_optim.averaging.checkpoint_averaging import CheckpointAveraging
from lightning_optim.averaging.checkpoints.average_checkpoints import average_checkpoints, average_weights
from lightning_optim.averaging.checkpoints.inspecting import averaged_state_dict
from lightning_optim.averaging.checkpoints.soup import greedy_soup
from lightning_optim.averaging.ema import EMA
from lightning_optim.averaging.ema_weight_averaging import EMAWeightAveraging
from lightning_optim.averaging.lawa import LAWA
from lightning_optim.averaging.stochastic_weight_averaging import StochasticWeightAveraging
from lightning_optim.averaging.swa import SWA
from lightning_optim.averaging.weight_averaging import WeightAveraging
from lightning_optim.base.policy import Policy
from lightning_optim.base.schedules import Constant, Cosine, Exponential, Linear, Piecewise, Schedule
from lightning_optim.ensembling.cost_benefit import cost_benefit
from lightning_optim.ensembling.diversity import Disagreement
from lightning_optim.ensembling.ensemble import Ensemble
from lightning_optim.ensembling.fit_members import fit_members
from lightning_optim.gradients.clipping.agc import AGC
from lightning_optim.gradients.clipping.autoclip import AutoClip
from lightning_optim.gradients.clipping.by_norm import ClipByNorm
from lightning_optim.gradients.clipping.by_value import ClipByValue
from lightning_optim.gradients.clipping.centralize import Centralize
from lightning_optim.gradients.clipping.clipping import Clipping
from lightning_optim.gradients.clipping.noise import Noise
from lightning_optim.gradients.clipping.norm_clipping import NormClipping
from lightning_optim.gradients.clipping.zclip import ZClip
from lightning_optim.gradients.gradient_accumulation import GradientAccumulation
from lightning_optim.gradients.gradient_clipping import GradientClipping
from lightning_optim.gradients.gradient_monitor import GradientMonitor
from lightning_optim.gradients.manual_optimization import ManualOptimizationMixin
from lightning_optim.gradients.sharpness_aware import SharpnessAwareMixin
from lightning_optim.gradients.target_batch_size import TargetBatchSize
from lightning_optim.regularization.dropout import DropPath
from lightning_optim.regularization.penalties import L1, L2, ElasticNet, Penalty
from lightning_optim.regularization.proximal import Proximal, ProximalL1
from lightning_optim.regularization.regularization_mixin import RegularizationMixin
from lightning_optim.regularization.scheduled_dropout import ScheduledDropout
from lightning_optim.regularization.weight_regularization import WeightRegularization
from lightning_optim.resume.exact_resume import ExactResume
from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.evaluated_weights import evaluated_state
from lightning_optim.runtime.order import Slot
from lightning_optim.runtime.step import OptimizerStep, drop_step, gradients_of, total_steps
from lightning_optim.stopping.combined_criteria import AllOf, AnyOf, AtLeast
from lightning_optim.stopping.criteria import Criterion, Divergence, NonFinite, Plateau, Threshold
from lightning_optim.stopping.early_stopping import EarlyStopping

__all__ = [
    "AGC",
    "EMA",
    "L1",
    "L2",
    "LAWA",
    "SWA",
    "AllOf",
    "AnyOf",
    "AtLeast",
    "AutoClip",
    "Average",
    "Centralize",
    "CheckpointAveraging",
    "ClipByNorm",
    "ClipByValue",
    "Clipping",
    "Constant",
    "Cosine",
    "Criterion",
    "Disagreement",
    "Divergence",
    "DropPath",
    "EMAWeightAveraging",
    "EarlyStopping",
    "ElasticNet",
    "Ensemble",
    "ExactResume",
    "Exponential",
    "GradientAccumulation",
    "GradientClipping",
    "GradientMonitor",
    "Linear",
    "ManualOptimizationMixin",
    "Noise",
    "NonFinite",
    "NormClipping",
    "OptimCallback",
    "OptimizerStep",
    "Penalty",
    "Piecewise",
    "Plateau",
    "Policy",
    "Proximal",
    "ProximalL1",
    "RegularizationMixin",
    "Schedule",
    "ScheduledDropout",
    "SharpnessAwareMixin",
    "Slot",
    "StochasticWeightAveraging",
    "TargetBatchSize",
    "Threshold",
    "WeightAveraging",
    "WeightRegularization",
    "ZClip",
    "average_checkpoints",
    "average_weights",
    "averaged_state_dict",
    "cost_benefit",
    "drop_step",
    "evaluated_state",
    "fit_members",
    "gradients_of",
    "greedy_soup",
    "refresh_batchnorm_",
    "total_steps",
]
