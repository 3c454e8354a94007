"""Figures about ternary weights and their training."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_lora.plots.style import ACCENT, INK, box, new_axes

_STYLES = ((ACCENT, "-", "o"), (INK, "--", "s"), ("#6fa8dc", "-.", "^"), ("#777777", ":", "D"))


def bit_linear_diagram():
    """A BitLinear layer from left to right: norm, 8-bit codes, ternary product, scales; above it the latent weights.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    ax = Figure(figsize=(7.8, 3.1), layout="constrained").add_subplot()
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    lower = (  # left edge, width, text, face
        (1.4, 2.4, "RMS norm", "white"),
        (5.0, 3.4, "8-bit codes\ns = max|x| / 127", "#d5e3f3"),
        (9.8, 3.0, "integer\nproduct", "#9fc5e8"),
        (14.2, 2.0, "· s · γ", "white"),
    )
    for left, width, text, face in lower:
        ax.add_patch(box(left, 0, width, 1.4, face))
        ax.text(left + width / 2, 0.7, text, ha="center", va="center", fontsize=9, color=INK)
    for start, end in ((0.5, 1.4), (3.8, 5.0), (8.4, 9.8), (12.8, 14.2), (16.2, 17.1)):
        ax.annotate("", (end, 0.7), (start, 0.7), arrowprops=arrow)
    ax.text(0.4, 0.7, "x", ha="right", va="center", color=INK)
    ax.text(17.3, 0.7, "y", ha="left", va="center", color=INK)
    for bottom, text, face in ((2.2, "−1, 0, 1\nγ = mean|W|", "#d5e3f3"), (4.4, "latent W\nfloat32", "white")):
        ax.add_patch(box(9.5, bottom, 3.6, 1.4, face))
        ax.text(11.3, bottom + 0.7, text, ha="center", va="center", fontsize=9, color=INK)
    ax.annotate("", (10.9, 3.6), (10.9, 4.4), arrowprops=arrow)
    ax.annotate("", (10.9, 1.4), (10.9, 2.2), arrowprops=arrow)
    back = arrow | {"color": ACCENT, "linestyle": "--"}
    ax.annotate("", (13.1, 5.1), (13.1, 0.9), arrowprops=back | {"connectionstyle": "arc3,rad=0.55"})
    ax.text(14.6, 3.4, "gradient of W,\npast the rounding", color=ACCENT, fontsize=9, va="center")
    ax.text(5.0, 5.1, "kept for training only", color=INK, fontsize=9, va="center")
    ax.annotate("", (9.4, 5.1), (8.9, 5.1), arrowprops=arrow | {"linewidth": 1})
    ax.set_xlim(-0.2, 18)
    ax.set_ylim(-0.2, 6)
    ax.set_axis_off()
    return ax


def ternary_zones(panels: dict[str, Sequence], limit: float = 4.0):
    """Histograms of weights in units of their γ, with the thresholds ±γ/2 and the share that each code gets.

    Args:
        panels: `{title: weights}`, a panel each from the left.
        limit: Where the axis ends, in γ; what lies beyond is counted in the last bar.

    Returns:
        The last panel's Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    size = (0.6 + 3.4 * len(panels), 3.2)
    axes = Figure(figsize=size, layout="constrained").subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (title, weights) in zip(axes, panels.items(), strict=True):
        values = np.ravel(weights) / np.mean(np.abs(weights))
        edges = np.linspace(-limit, limit, 65)  # ±1/2 is an edge
        shares = np.histogram(np.clip(values, -limit, limit), edges)[0] / values.size
        for low, high, face, hatch in (
            (-limit, -0.5, "#9fc5e8", "//"),
            (-0.5, 0.5, "white", ""),
            (0.5, limit, ACCENT, ""),
        ):
            inside = (edges[:-1] >= low - 1e-9) & (edges[1:] <= high + 1e-9)
            style = {"facecolor": face, "edgecolor": INK, "linewidth": 0.4, "hatch": hatch}
            new_axes(ax).bar(edges[:-1][inside], 100 * shares[inside], np.diff(edges)[0], align="edge", **style)
        codes = np.clip(np.rint(values), -1, 1)
        for code, x, side in ((-1, 0.02, "left"), (0, 0.5, "center"), (1, 0.98, "right")):
            text = f"{str(code).replace('-', '−')}\n{np.mean(codes == code):.0%}"
            ax.text(x, 0.98, text, transform=ax.transAxes, ha=side, va="top", fontsize=9, color=INK)
        for threshold in (-0.5, 0.5):
            ax.axvline(threshold, color=INK, linestyle="--", linewidth=1)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("weight (in units of γ)")
        ax.set_xlim(-limit, limit)
        ax.margins(y=0.3)
    axes[0].set_ylabel("weights a bar (%)")
    return axes[-1]


def curves_with_levels(
    curves: dict[str, Sequence[float]], levels: dict[str, float], ylabel: str, window: int = 20, ax=None
):
    """Losses against steps, as running means, beside levels that need no training.

    Args:
        curves: `{name: one number a step}`, at most four.
        levels: `{name: number}`, horizontal lines with their name on them.
        ylabel: What the numbers are, with the unit.
        window: Integer, steps of the running mean.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    import numpy as np

    ax = new_axes(ax)
    for (name, values), (colour, line, _) in zip(curves.items(), _STYLES, strict=False):
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        steps = np.arange(window, len(values) + 1)
        ax.plot(steps, mean, color=colour, linestyle=line, linewidth=1.8, label=name)
    for name, level in levels.items():
        ax.axhline(level, color="#777777", linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        ax.annotate(name, (0.995, level), (0, 2), fontsize=9, color=INK, ha="right", **place)
    ax.set_xlabel(f"optimizer step (mean of {window})")
    ax.set_ylabel(ylabel)
    ax.legend(frameon=False, loc="upper center")
    return ax


def spread_against(points: dict[str, dict[float, Sequence[float]]], xlabel: str, ylabel: str, ax=None):
    """Repeated measurements against a setting on a logarithmic scale: a mark for each, lines through the means.

    Args:
        points: `{name: {setting: measurements}}`, at most four names.
        xlabel, ylabel: What the axes show, with units.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    import numpy as np

    ax = new_axes(ax)
    for (name, measured), (colour, line, marker) in zip(points.items(), _STYLES, strict=False):
        settings = sorted(measured)
        for setting in settings:
            values = measured[setting]
            style = {"marker": marker, "linestyle": "none", "markersize": 6, "markerfacecolor": "none"}
            ax.plot([setting] * len(values), values, color=colour, **style)
        means = [np.mean(measured[setting]) for setting in settings]
        ax.plot(settings, means, color=colour, linestyle=line, marker=marker, markersize=3, linewidth=1.8, label=name)
    ax.set_xscale("log", base=2)
    ticks = sorted({setting for measured in points.values() for setting in measured})
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if len(points) > 1:
        ax.legend(frameon=False)
    return ax
