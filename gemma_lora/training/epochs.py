"""How many passes over the training lines, where nobody says."""

from __future__ import annotations

#: Lines shown in all, over all passes. A batch packs some twenty short lines, so one pass over 300 is 14 steps only.
#: With four passes (56 steps) and no option, a task of 300 lines and six answers got 60 of 60 test lines right.
LINES_SHOWN = 1200
#: The bound for files of fewer than some 200 lines: shown more often, the model would overfit them.
MOST_EPOCHS = 6


def default_epochs(lines: int) -> int:
    """The number of passes that show about `LINES_SHOWN` lines, from 1 to `MOST_EPOCHS`.

    Args:
        lines: Integer, the training lines of one pass.

    Example:

    >>> [default_epochs(lines) for lines in (150, 300, 2200)]
    [6, 4, 1]
    """
    if lines < 1:
        raise ValueError(f"`lines` must be at least 1. Received: lines={lines!r}")
    return min(MOST_EPOCHS, max(1, round(LINES_SHOWN / lines)))
