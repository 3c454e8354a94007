"""How many passes over the training lines, where nobody says."""

from __future__ import annotations

#: Lines shown in all. MEASURED
LINES_SHOWN = 1200
#: More passes than this learn few lines by heart.
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
