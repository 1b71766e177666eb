"""Build policies in pure torch, without a Trainer. The names here are public: docs/extend.md shows how to use them."""

from lightning_optim.base.arguments import check_choice as check_choice
from lightning_optim.base.arguments import check_number as check_number
from lightning_optim.base.dtypes import accumulation_dtype as accumulation_dtype
from lightning_optim.base.dtypes import without_autocast as without_autocast
from lightning_optim.base.foreach import chunks as chunks
from lightning_optim.base.norms import nonzero_counts as nonzero_counts
from lightning_optim.base.norms import row_dims as row_dims
from lightning_optim.base.norms import row_sums as row_sums
from lightning_optim.base.norms import tensor_norms as tensor_norms
from lightning_optim.base.norms import total_norm as total_norm
from lightning_optim.base.policy import ParameterPolicy as ParameterPolicy
from lightning_optim.base.policy import PerOptimizer as PerOptimizer
from lightning_optim.base.policy import Policy as Policy
from lightning_optim.base.public_names import publish
from lightning_optim.base.ring_buffer import Ring as Ring
from lightning_optim.base.schedules import Schedule as Schedule
from lightning_optim.base.schedules import position as position
from lightning_optim.base.schedules import value_at as value_at
from lightning_optim.base.selection import Selectors as Selectors
from lightning_optim.base.selection import select as select
from lightning_optim.base.shards import local_shards as local_shards
from lightning_optim.base.shards import shard_of as shard_of
from lightning_optim.base.shards import whole as whole
from lightning_optim.base.state import Nested as Nested
from lightning_optim.base.state import PerUnit as PerUnit
from lightning_optim.base.state import PerWeight as PerWeight
from lightning_optim.base.state import RingState as RingState
from lightning_optim.base.state import State as State
from lightning_optim.base.state import Value as Value
from lightning_optim.base.state import WeightStates as WeightStates
from lightning_optim.base.state import nested as nested
from lightning_optim.base.state import per_unit as per_unit
from lightning_optim.base.state import per_weight as per_weight
from lightning_optim.base.state import ring as ring

__all__ = publish(globals())
