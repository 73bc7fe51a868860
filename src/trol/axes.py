"""Shapes: the letters of axes, and the tensors that most functions take and return.

B rows of a batch, T tokens of a call, S tokens so far, D hidden size, L layers, R most visits,
H heads, d head size, V vocabulary. The tests check them where they run (tests/test_axes.py); in use
the annotations cost nothing.
"""

from jaxtyping import Bool, Float, Integer
from torch import Tensor

States = Float[Tensor, "B T D"]
"""Hidden states."""

TokenMask = Bool[Tensor, "B T"]
"""One truth for each token."""

TokenIds = Integer[Tensor, "B T"]
"""Ids or labels."""

Logits = Float[Tensor, "B T V"]
"""Predictions, before softmax."""

Keys = Float[Tensor, "B H T d"]
"""Keys or values."""
