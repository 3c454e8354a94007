"""Figures about scores of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemma_lora.plots.style import ACCENT, INK, new_axes

_LONGEST = 24  # characters of a class's name that are shown


def confusion_matrix(counts, rows: Sequence[str], columns: Sequence[str], ax=None, title: str = ""):
    """How often which answer was given for which class: numbers in a grid, the darker the more.

    Args:
        counts: (R, C) integers: lines that were answered with row r where column c is right.
        rows: R names of answers; the last one may stand for all answers that are no class.
        columns: C names of classes.
        ax: Matplotlib Axes; a new figure's by default.
        title: What stands above it.

    Returns:
        The Axes.
    """
    import numpy as np

    counts = np.asarray(counts)
    ax = new_axes(_sized(len(rows), len(columns)) if ax is None else ax)
    ax.grid(False)
    # A class's share of its lines, so that rare classes are seen too.
    shares = counts / np.maximum(counts.sum(axis=0, keepdims=True), 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    if len(columns) <= 30:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                shade = "white" if shares[row, column] > 0.6 else INK
                ax.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=8)
    if len(rows) > len(columns):  # answers that are no class
        ax.axhline(len(columns) - 0.5, color=INK, linewidth=1)
    ax.set_xticks(range(len(columns)), [_shortened(name) for name in columns], rotation=45, ha="right", fontsize=8)
    ax.set_yticks(range(len(rows)), [_shortened(name) for name in rows], fontsize=8)
    for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        label.set_parse_math(False)  # a class may hold a dollar sign
    ax.set_xlabel("right answer")
    ax.set_ylabel("answer given")
    ax.set_title(title, fontsize=10, parse_math=False)
    return ax


def confusion_matrices(tables: Mapping[str, Mapping]):
    """Confusion matrices of several splits, side by side.

    Args:
        tables: `{split: {"rows", "columns", "counts"}}`, at least one.

    Returns:
        The first Axes.
    """
    from matplotlib.figure import Figure

    sizes = [_size(len(table["rows"]), len(table["columns"])) for table in tables.values()]
    size = sum(width for width, _ in sizes), max(height for _, height in sizes)
    axes = Figure(figsize=size, layout="constrained").subplots(1, len(sizes), squeeze=False)[0]
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        confusion_matrix(table["counts"], table["rows"], table["columns"], ax, title=name)
    return axes[0]


def _size(rows: int, columns: int) -> tuple[float, float]:
    """Inches of a figure whose names and numbers do not touch."""
    return 2.2 + max(2.0, 0.38 * columns), 1.6 + max(1.8, 0.38 * rows)


def _sized(rows: int, columns: int):
    from matplotlib.figure import Figure

    return Figure(figsize=_size(rows, columns), layout="constrained").add_subplot()


def _shortened(name: str) -> str:
    line = " ".join(name.split()) or "(empty)"
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def validation_losses(losses: Sequence[float], before: float | None = None, ax=None):
    """The loss on the validation lines after each epoch, the lowest marked.

    Args:
        losses: One for each epoch, in nats per token.
        before: The loss before the training, drawn at epoch 0.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    ax = new_axes(ax)
    values = [*([before] if before is not None else []), *losses]
    epochs = list(range(len(losses) + 1 - len(values), len(losses) + 1))
    ax.plot(epochs, values, "o-", color=INK)
    best = min(range(len(values)), key=values.__getitem__)
    ax.plot(epochs[best], values[best], "o", color=ACCENT, markersize=11, label=f"lowest: {values[best]:.2g}")
    ax.set_xticks(epochs)
    ax.set_ylim(0, None)
    ax.set_xlabel("epoch (0: before the training)" if before is not None else "epoch")
    ax.set_ylabel("loss on validation lines (nats per token)")
    ax.legend(frameon=False)
    return ax
