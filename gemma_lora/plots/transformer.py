"""Figures about tokens, attention and the transformer block."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_lora.plots.style import ACCENT, INK, box, new_axes


def token_strips(rows: dict[str, Sequence[str]]):
    """Texts as rows of boxes, a box for each token, as wide as its letters.

    Args:
        rows: `{label: tokens as strings}`; the label stands above its row.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    size = (7.6, 0.62 * len(rows) + 0.1)
    ax = Figure(figsize=size, layout="constrained").add_subplot()
    for number, (label, tokens) in enumerate(rows.items()):
        top, x = 2.2 * number, 0.0
        ax.text(0, top - 0.15, label, fontsize=9, color=INK, va="bottom")
        for i, token in enumerate(tokens):
            width = len(token) + 0.9
            ax.add_patch(box(x, top, width, 1, "#d5e3f3" if i % 2 else "white"))
            ax.text(x + width / 2, top + 0.52, token, ha="center", va="center", fontsize=9, color=INK)
            x += width
    widest = max(sum(len(token) + 0.9 for token in tokens) for tokens in rows.values())
    ax.set_xlim(-0.3, max(widest, 50) + 0.3)
    ax.set_ylim(2.2 * len(rows) - 1, -1)
    ax.set_axis_off()
    return ax


def ranked_bars(panels: dict[str, dict[str, float]], xlabel: str, form: str = "{:.2f}"):
    """Named numbers as horizontal bars, in the order given, a panel for each group.

    Args:
        panels: `{title: {name: number, at least 0}}`.
        xlabel: What the numbers are, with the unit.
        form: How the number at a bar's end is written.

    Returns:
        The last panel's Axes.
    """
    from matplotlib.figure import Figure

    longest = max(len(values) for values in panels.values())
    size = (7.6 if len(panels) > 1 else 6.4, 0.27 * longest + 0.9)
    axes = Figure(figsize=size, layout="constrained").subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        new_axes(ax).grid(visible=False)
        bars = ax.barh(list(values), list(values.values()), 0.7, facecolor="#9fc5e8", edgecolor=INK)
        ax.bar_label(bars, [form.format(value) for value in values.values()], padding=3, fontsize=9)
        ax.set_xlim(0, 1.22 * max(values.values()))
        ax.invert_yaxis()
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel(xlabel)
    return axes[-1]


def lines(curves: dict[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str, ax=None):
    """Curves in one diagram, told apart by line style too.

    Args:
        curves: `{name: (x, y)}`, at most four.
        xlabel, ylabel: What the axes show, with units.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    ax = new_axes(ax)
    styles = [(ACCENT, "-"), (INK, "--"), ("#6fa8dc", "-."), ("#777777", ":")]
    for (name, (x, y)), (colour, line) in zip(curves.items(), styles, strict=False):
        ax.plot(x, y, color=colour, linestyle=line, linewidth=1.8, label=name)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if len(curves) > 1:
        ax.legend(frameon=False)
    return ax


def rotations(panels: dict[str, Sequence[float]]):
    """Arrows on a unit circle, one for each position of a token, numbered from 0.

    Args:
        panels: `{title: angle of each position, radians}`.

    Returns:
        The last panel's Axes.
    """
    import math

    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    size = (2.5 * len(panels), 2.8)
    axes = Figure(figsize=size, layout="constrained").subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, angles) in zip(axes, panels.items(), strict=True):
        ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor="#bbbbbb"))
        for position, angle in enumerate(angles):
            x, y = math.cos(angle), math.sin(angle)
            style = {"arrowstyle": "-|>", "color": ACCENT if position else INK, "linewidth": 1.4, "shrinkA": 0}
            ax.annotate("", (x, y), (0, 0), arrowprops=style)
            if position in (0, len(angles) - 1) or abs(angle) > 0.2 * position:  # else the numbers overlap
                ax.text(1.17 * x, 1.17 * y, str(position), ha="center", va="center", fontsize=9, color=INK)
        ax.set_xlim(-1.35, 1.35)
        ax.set_ylim(-1.35, 1.35)
        ax.set_aspect("equal")
        ax.set_xlabel("first of the pair")
        ax.set_ylabel("second of the pair")
        ax.set_xticks([-1, 0, 1])
        ax.set_yticks([-1, 0, 1])
        ax.set_title(title, loc="left", fontsize=10)
    return axes[-1]


def attention_maps(maps: dict[str, Sequence], tokens: Sequence[str] | None = None, numbers: bool = False):
    """Attention weights, or masks, as shaded squares: a row for each reading token, a column for each token read.

    Args:
        maps: `{title: (T, T) numbers from 0, white, to 1, dark}`.
        tokens: T strings beside rows and columns; without them the axes count positions.
        numbers: Whether to write each number above 0 into its square.

    Returns:
        The last map's Axes.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    shades = LinearSegmentedColormap.from_list("ink", ["white", "#9fc5e8", ACCENT, "#06223d"])
    size = (0.6 + 3.5 * len(maps), 3.9)
    axes = Figure(figsize=size, layout="constrained").subplots(1, len(maps), squeeze=False)[0]
    for ax, (title, values) in zip(axes, maps.items(), strict=True):
        array = np.asarray(values, float)
        ax.imshow(array, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
        if numbers:
            for (i, j), value in np.ndenumerate(array):
                colour = "white" if value > 0.5 else INK
                ax.text(j, i, f"{value:.2f}" if value else "", ha="center", va="center", color=colour)
        if tokens is not None:
            ax.set_xticks(range(len(tokens)), tokens, rotation=90)
            ax.set_yticks(range(len(tokens)), tokens)
        ax.set_xlabel("token read")
        ax.set_ylabel("reading token")
        ax.set_title(title, loc="left", fontsize=10)
    return axes[-1]


def transformer_block():
    """One Gemma block: the residual stream from left to right, attention and MLP as detours that add to it.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    ax = Figure(figsize=(7.6, 2.3), layout="constrained").add_subplot()
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (20.6, 0), (0, 0), arrowprops=arrow | {"linewidth": 3, "color": ACCENT})
    ax.text(0, -0.25, "residual stream (T, D)", color=ACCENT, va="top")
    for left, name in ((1, "attention:\ntokens exchange"), (11, "MLP:\neach token alone")):
        stops = (
            (left + 0.5, 1.6, "norm", "white"),
            (left + 2.6, 3.5, name, "#d5e3f3"),
            (left + 6.6, 1.6, "norm", "white"),
        )
        ax.plot([left, left], [0, 2], color=INK, linewidth=1.4)
        ax.plot([left, left + 8.8], [2, 2], color=INK, linewidth=1.4, zorder=0)
        ax.annotate("", (left + 8.8, 0.25), (left + 8.8, 2), arrowprops=arrow)
        for x, width, text, face in stops:
            ax.add_patch(box(x, 1.4, width, 1.2, face))
            ax.text(x + width / 2, 2, text, ha="center", va="center", fontsize=9, color=INK)
        ax.plot([left + 8.8], [0], marker="o", markersize=15, color="white", markeredgecolor=INK)
        ax.text(left + 8.8, 0, "+", ha="center", va="center", fontsize=12, color=INK)
    ax.set_xlim(-0.3, 21)
    ax.set_ylim(-1, 2.9)
    ax.set_axis_off()
    return ax
