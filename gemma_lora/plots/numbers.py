"""Figures about number formats, quantization and its error."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_lora.plots.style import ACCENT, INK, box, new_axes


def bit_layouts(formats: dict[str, tuple[int, int, int]], ax=None):
    """What each bit of a format is for: a box a bit, sign, exponent and mantissa told apart by fill and letter.

    Args:
        formats: `{name: (sign bits, exponent bits, mantissa bits)}`, drawn from the top; an integer has no exponent.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(7, 0.36 * len(formats) + 0.9), layout="constrained").add_subplot()
    kinds = (("s", INK, "white"), ("e", "#9fc5e8", INK), ("m", "white", INK))  # letter, fill, letter's colour
    for row, bits in enumerate(formats.values()):
        x = 0
        for (letter, face, colour), count in zip(kinds, bits, strict=True):
            for _ in range(count):
                ax.add_patch(box(x, row - 0.36, 1, 0.72, face))
                ax.text(x + 0.5, row, letter, ha="center", va="center", fontsize=7, color=colour)
                x += 1
    ax.set_xlim(-0.2, max(sum(bits) for bits in formats.values()) + 0.2)
    ax.set_ylim(len(formats) - 0.4, -0.6)
    ax.set_yticks(range(len(formats)), list(formats))
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.set_xlabel("bits; s: sign, e: exponent, m: mantissa (of an integer: the number itself)")
    return ax


def value_bars(values: dict[str, float], xlabel: str, fmt: str = "{:.3g}", ax=None):
    """One number a name as horizontal bars from zero, the number written at the end.

    Args:
        values: `{name: number}`, drawn from the top.
        xlabel: What the numbers are, with their unit.
        fmt: How a number is written, for `str.format`.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(7, 0.34 * len(values) + 0.9), layout="constrained").add_subplot()
    ax = new_axes(ax)
    names = list(values)[::-1]
    bars = ax.barh(names, [values[name] for name in names], 0.6, facecolor="#9fc5e8", edgecolor=INK)
    ax.bar_label(bars, [fmt.format(values[name]) for name in names], padding=4)
    ax.set_xlim(0, 1.15 * max(values.values()))
    ax.grid(axis="x", color="#dddddd", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(xlabel)
    return ax


def histogram_with_ranges(values, ranges: dict[str, tuple[float, float]], xlabel: str, ax=None):
    """A histogram with a logarithmic count, so that a single outlier shows, and ranges as pairs of vertical lines.

    Args:
        values: Numbers, of any shape.
        ranges: `{name: (low, high)}`; may be empty.
        xlabel: What the numbers are, with their unit.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    import numpy as np

    ax = new_axes(ax)
    ax.hist(np.ravel(values), bins=121, facecolor="#cccccc", edgecolor="#888888", linewidth=0.4)
    styles = ((INK, "-"), (ACCENT, "--"), (INK, ":"), (ACCENT, "-."))
    for (name, ends), (colour, style) in zip(ranges.items(), styles, strict=False):
        for end, label in zip(ends, (name, None), strict=True):
            ax.axvline(end, color=colour, linestyle=style, linewidth=1.8, label=label)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)
    low, high = ax.get_xlim()
    ax.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    ax.set_xlabel(xlabel)
    ax.set_ylabel("how many (log scale)")
    if ranges:
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def number_grids(grids: dict[str, Sequence[float]], data: Sequence[float], xlabel: str, ax=None):
    """Which numbers a quantization can write: a row of ticks each, tall where some number rounds to it.

    Args:
        grids: `{name: the numbers that have a code}`, drawn from the top.
        data: The numbers to be quantized, drawn as dots in the last row.
        xlabel: What the numbers are, with their unit.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(7, 0.5 * len(grids) + 1.3), layout="constrained").add_subplot()
    values = np.ravel(data)
    for row, grid in enumerate(grids.values()):
        nearest = np.unique(np.abs(np.subtract.outer(values, grid)).argmin(1))
        for value, inside in zip(grid, np.isin(np.arange(len(grid)), nearest), strict=True):
            style = {"color": INK, "linewidth": 2} if inside else {"color": "#999999", "linewidth": 1}
            ax.plot([value, value], [row - (0.32 if inside else 0.16), row + (0.32 if inside else 0.16)], **style)
    heights = len(grids) + np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
    ax.plot(values, heights, "o", color=ACCENT, markersize=2.5, alpha=0.6)
    ax.axvline(0, color=INK, linestyle=":", linewidth=1)
    ax.set_yticks(range(len(grids) + 1), [*grids, "data"])
    ax.set_ylim(len(grids) + 0.5, -0.6)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.set_xlabel(xlabel)
    return ax


def error_maps(errors: dict[str, Sequence], rows_a_cell: int, columns_a_cell: int):
    """Where the error sits: matrices of |error| side by side, averaged over small cells, on one logarithmic scale.

    Args:
        errors: `{title: matrix of errors}`, all of one shape.
        rows_a_cell, columns_a_cell: Integers, the numbers averaged into a cell; they divide the shape.

    Returns:
        The last Axes.
    """
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(errors), sharey=True)
    cells = {}
    for title, error in errors.items():
        rows, columns = (
            side // size for side, size in zip(np.shape(error), (rows_a_cell, columns_a_cell), strict=True)
        )
        cells[title] = np.abs(error).reshape(rows, rows_a_cell, columns, columns_a_cell).mean((1, 3))
    top = max(float(cell.max()) for cell in cells.values())
    norm = LogNorm(top / 100, top)
    for panel, (title, cell) in zip(panels, cells.items(), strict=True):
        extent = (0, cell.shape[1] * columns_a_cell, cell.shape[0] * rows_a_cell, 0)
        shown = np.maximum(cell, top / 100)
        image = panel.imshow(shown, cmap="Greys", norm=norm, extent=extent, aspect="auto", interpolation="nearest")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("input")
    panels[0].set_ylabel("output (a channel a row)")
    figure.colorbar(image, ax=list(panels), label="mean |x − x̂| (log scale)")
    return panels[-1]


def error_against_size(points: dict[str, tuple[float, float]], ax=None):
    """Error against size, a named point each: left is smaller, down is better.

    Args:
        points: `{name: (bits a weight, relative error in %)}`.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    from matplotlib.ticker import MultipleLocator

    ax = new_axes(ax)
    for name, (size, error) in points.items():
        ax.plot(size, error, "o", color=ACCENT, markeredgecolor=INK, markersize=7)
        crowded = any(abs(size - x) < 2 and error < y < 3 * error for x, y in points.values())
        ax.annotate(name, (size, error), (8, -11 if crowded else 3), textcoords="offset points", color=INK)
    ax.set_yscale("log")
    ax.set_xlim(0, 1.25 * max(size for size, _ in points.values()))
    ax.xaxis.set_major_locator(MultipleLocator(4))
    ax.set_xlabel("size (bits a weight, scales included)")
    ax.set_ylabel("relative error (%, log scale)")
    return ax


def staircase(x: Sequence[float], quantized: Sequence[float], gradient: Sequence[float], ax=None):
    """Fake quantization in one picture: the staircase that is computed, and the slope that is passed back.

    Args:
        x: Increasing numbers.
        quantized: What they become.
        gradient: The derivative that the straight-through estimator gives at each.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    ax = new_axes(ax)
    ax.plot(x, x, color="#888888", linewidth=1, linestyle="--", label="x")
    ax.plot(x, quantized, color=ACCENT, linewidth=2.2, label="x̂, what goes forward")
    ax.plot(x, gradient, color=INK, linewidth=1.6, linestyle=":", label="slope that goes back")
    ax.set_xlabel("x")
    ax.set_ylabel("value")
    ax.legend(frameon=False, loc="lower right")
    return ax
