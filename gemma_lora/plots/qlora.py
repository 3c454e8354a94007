"""Figures about training on packed weights: encodings and methods compared, paired losses, memory, rounding twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemma_lora.plots.style import ACCENT, INK, new_axes

_LIGHT, _GREY = "#9fc5e8", "#777777"


def value_rows(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    names: Sequence[str],
    errors: Mapping[str, Mapping[str, float]] | None = None,
    reference: str | None = None,
    form: str = "{:.3g}",
    missing: str = "not run yet",
):
    """Several quantities of many things: a row for each thing, a panel for each quantity, side by side.

    A thing that was measured several times has a small ring for each measurement and a dot at their mean. Names without
    a measurement keep their row and say so.

    Args:
        panels: `{quantity, with its unit: {name: its measurements}}`.
        names: All names, from the top.
        errors: `{quantity: {name: half-width}}`, whiskers around the mean.
        reference: A name whose mean is a vertical line in every panel.
        form: How a mean is written above its dot, for `str.format`; from 1,000 on it is written whole.
        missing: What stands in the first panel of a row without any measurement.

    Returns:
        The last panel's Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 0.34 * len(names) + 1.1), layout="constrained")
    axes = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    places = {name: row for row, name in enumerate(names)}
    for ax, (quantity, measured) in zip(axes, panels.items(), strict=True):
        new_axes(ax).grid(axis="y", visible=False)
        ax.grid(axis="x", color="#dddddd", linewidth=0.8)
        means = {name: float(np.mean(values)) for name, values in measured.items() if len(values)}
        if reference in means:
            ax.axvline(means[reference], color=_GREY, linewidth=1.2, linestyle=(0, (6, 2)))
        for name, mean in means.items():
            half, values = (errors or {}).get(quantity, {}).get(name, 0.0), measured[name]
            if half:
                ax.errorbar([mean], [places[name]], xerr=half, fmt="none", ecolor=INK, elinewidth=1.4, capsize=3)
            if len(values) > 1:
                ring = {"marker": "o", "markersize": 7, "markerfacecolor": "none", "linestyle": "none", "zorder": 4}
                ax.plot(values, [places[name]] * len(values), color=INK, markeredgewidth=0.9, **ring)
            ax.plot([mean], [places[name]], marker="o", markersize=5, color=ACCENT)
            place = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": INK}
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
            text = form.format(mean) if abs(mean) < 1000 else f"{mean:,.0f}"
            ax.annotate(text, (mean, places[name]), (0, 6), bbox=behind, **place)
        ax.locator_params(axis="x", nbins=5)
        if not means:
            ax.set_xticks([])
        ax.margins(x=0.12)
        ax.set_xlabel(quantity, fontsize=9)
        ax.tick_params(labelsize=9)
    for name, row in places.items():
        if not any(len(measured.get(name, ())) for measured in panels.values()):
            inside = {"transform": axes[0].get_yaxis_transform(), "va": "center", "fontsize": 9}
            axes[0].text(0.03, row, missing, color=_GREY, style="italic", **inside)
    axes[0].set_yticks(range(len(names)), list(names))
    axes[0].set_ylim(len(names) - 0.5, -0.75)
    return axes[-1]


def paired_losses(curves: Mapping[str, Sequence[float]], ylabel: str = "loss (nats a token)"):
    """Two trainings on the same batches: both losses above, the second's less the first's below, step by step.

    Args:
        curves: `{name: one loss a step}`, two of them, equally long.
        ylabel: What the numbers are, with the unit.

    Returns:
        The lower panel's Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    (first, one), (second, other) = curves.items()
    steps = np.arange(1, len(one) + 1)
    new_axes(above).plot(steps, one, color=INK, linestyle="--", marker="s", markersize=5, linewidth=1.6, label=first)
    above.plot(steps, other, color=ACCENT, linestyle="-", marker="o", markersize=5, linewidth=1.8, label=second)
    above.set_ylim(bottom=0)
    above.set_ylabel(ylabel)
    above.legend(frameon=False)
    new_axes(below).bar(steps, np.subtract(other, one), 0.6, facecolor=_LIGHT, edgecolor=INK, linewidth=0.8)
    below.axhline(0, color=INK, linewidth=1)
    below.set_ylabel("difference")
    below.set_xlabel(f"optimizer step; the difference is {second} less {first}")
    below.set_xticks(steps[:: max(1, len(steps) // 12)])
    return below


def measured_and_planned(measured: Mapping[str, float], planned: Mapping[str, float], ax=None):
    """Memory as it was measured beside what arithmetic said, a pair of bars each, in GB.

    Args:
        measured: `{setting: bytes}`, drawn from the top.
        planned: `{setting: bytes}`; settings that are missing here have one bar.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(7.6, 0.62 * len(measured) + 1.1), layout="constrained").add_subplot()
    ax = new_axes(ax)
    for row, (name, size) in enumerate(measured.items()):
        pair = [(row - 0.19, size, ACCENT, "", "measured")]
        if name in planned:
            pair.append((row + 0.19, planned[name], "white", "////", "planned"))
        for place, value, face, hatch, label in pair:
            shown = label if label not in ax.get_legend_handles_labels()[1] else None
            bar = ax.barh([place], [value / 1e9], 0.36, facecolor=face, edgecolor=INK, hatch=hatch, label=shown)
            ax.bar_label(bar, [f"{value / 1e9:.2f}"], padding=3, fontsize=9)
    ax.set_yticks(range(len(measured)), list(measured))
    ax.set_ylim(len(measured) - 0.45, -0.55)
    ax.set_xlim(0, 1.1 * max([*measured.values(), *planned.values()]) / 1e9)
    ax.grid(axis="x", color="#dddddd", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("peak memory of the training process (GB)")
    ax.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def asked_and_got(asked: Sequence[float], got: Mapping[str, Sequence[float]], unit: str):
    """What was added to each of some weights, against what rounding made of it; a panel for each way of rounding.

    A thick line goes through the means of nine groups of equally many weights.

    Args:
        asked: What was added to each weight.
        got: `{way of rounding: how far each weight has moved}`, equally many.
        unit: What both are counted in.

    Returns:
        The last panel's Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9 * len(got), 3.7), layout="constrained")
    axes = list(figure.subplots(1, len(got), sharex=True, sharey=True, squeeze=False)[0])
    limit = 1.05 * float(np.abs(asked).max())
    for ax, (title, moved) in zip(axes, got.items(), strict=True):
        new_axes(ax).plot([-limit, limit], [-limit, limit], color=INK, linestyle="--", linewidth=1.2, label="all of it")
        style = {"linestyle": "none", "marker": ".", "markersize": 3.5, "alpha": 0.6}
        ax.plot(asked, moved, color=_LIGHT, label="a weight", **style)
        groups = np.array_split(np.argsort(asked), 9)
        means = [[np.mean(np.asarray(values)[group]) for group in groups] for values in (asked, moved)]
        ax.plot(*means, color=ACCENT, linewidth=2.4, marker="o", markersize=4, label="mean of each ninth")
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel(f"added ({unit})")
        ax.set_xlim(-limit, limit)
    axes[0].set_ylabel(f"moved ({unit})")
    axes[0].legend(frameon=False, loc="upper left", markerscale=1.6)
    return axes[-1]
