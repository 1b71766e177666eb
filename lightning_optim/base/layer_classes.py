"""Base classes of torch's normalization and dropout layers, which torch names with an underscore.

Third-party layers derive from them too, so that no list of public classes takes their place. Nothing else in the
package names them.
"""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _NormBase as RunningNormBase
from torch.nn.modules.dropout import _DropoutNd as DropoutBase

__all__ = ["BatchNormBase", "DropoutBase", "RunningNormBase"]
