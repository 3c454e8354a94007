"""What `FineTuner` and `fit` accept: each argument is looked at before anything changes."""

from __future__ import annotations

import math
import numbers
from typing import Any

#: Integer arguments and the smallest value of each.
_INTEGERS = {
    "rows": 1,
    "row_length": 1,
    "accumulate": 1,
    "chunk_size": 1,
    "seed": 0,
    "epochs": 1,
    "limit": 1,
    "batches": 1,
}


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def _expected(name: str, value: Any) -> str | None:
    """What was expected of the argument, if its value is not that."""
    if name in _INTEGERS:
        least = _INTEGERS[name]
        fine = isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least
        return None if fine else f"an integer of at least {least}"
    if name == "learning_rate":
        return None if _is_real(value) and 0 < value < math.inf else "a number above 0, and finite"
    if name == "warmup":
        return None if _is_real(value) and 0 <= value < 1 else "a number in [0, 1), the share of steps that rise"
    if name == "checkpoint_seconds":
        return None if _is_real(value) and value >= 0 else "a number of seconds, at least 0"
    raise KeyError(name)


def check_arguments(optional: tuple[str, ...] = (), **values: Any) -> None:
    """Looks at arguments of `FineTuner`, of `fit` and of `compile_for`.

    Args:
        optional: Names whose value may be None.
        **values: Arguments by name.

    Raises:
        ValueError: If a value is not what is expected. It names the argument, what was expected and what came.

    Example:

    >>> check_arguments(rows=2, learning_rate=5e-4)
    >>> check_arguments(epochs=0)
    Traceback (most recent call last):
    ValueError: `epochs` must be an integer of at least 1. Received: epochs=0
    """
    for name, value in values.items():
        if value is None and name in optional:
            continue
        if expected := _expected(name, value):
            none = ", or None" if name in optional else ""
            raise ValueError(f"`{name}` must be {expected}{none}. Received: {name}={value!r}")
