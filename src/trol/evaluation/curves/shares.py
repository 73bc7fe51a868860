"""Shares of the layers that stay, as a command names them: `0.1:1.0`, `0.2:0.8:0.2` or `0.5`."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from trol.errors import UsageError
from trol.policies.static_plans import kept_count

STEP = Decimal("0.1")
MOST = 100
"""Shares of one curve: more is a slip of the keyboard."""


def shares_of(text: str) -> list[float]:
    """`first:last[:step]`, both ends included, or one share, as numbers in rising order.

    Raises:
        UsageError: it is no such range, or a share is outside (0, 1].
    """
    try:
        numbers = [Decimal(part) for part in text.split(":")]
    except InvalidOperation:
        numbers = []
    if len(numbers) not in (1, 2, 3) or not all(number.is_finite() for number in numbers):
        raise UsageError(
            f"--keep is {text!r}; give first:last or first:last:step, such as 0.1:1.0 or "
            "0.25:1:0.25, or one share."
        )
    first, last = numbers[0], numbers[min(1, len(numbers) - 1)]
    step = numbers[2] if len(numbers) == 3 else STEP
    for share in (first, last):
        kept_count(1, float(share))
    if first > last or step <= 0:
        raise UsageError(
            f"--keep {text} has no shares: it begins at {first}, ends at {last} and goes by "
            f"{step}; begin with the smaller share and give a step above 0."
        )
    count = int((last - first) / step) + 1
    if count > MOST:
        raise UsageError(
            f"--keep {text} names {count} shares; give a step that makes {MOST} or fewer."
        )
    return [float(first + step * number) for number in range(count)]
