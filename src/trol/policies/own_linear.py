"""A linear map of a policy's own, which nobody takes for one of the host's."""

from __future__ import annotations

import torch
from torch import nn

from trol.policies.untrained import Learnt


class OwnLinear(Learnt):
    """Parameters of y = W x + b with nn.Linear's own first values; W is [out, in], b [out].

    No `nn.Linear`, so that what looks for linear maps in a host (LoRA on all of them,
    quantisation, FLOPs of a layer) leaves it alone.
    """

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(narrow, wide))
        self.bias = nn.Parameter(torch.empty(narrow))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the parameters to nn.Linear's own first values."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]  # which reads these two alone
