"""Figures about what fine-tuning costs, and how to choose LoRA's rank and learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemma_lora.plots.style import ACCENT, INK, box, new_axes

_LIGHT, _GREY = "#6fa8dc", "#777777"
#: Colour, line and marker of one curve after another: told apart in black and white, too.
_STYLES = [(ACCENT, "-", "o"), (INK, "--", "s"), (_LIGHT, "-.", "^"), (_GREY, ":", "D")]
#: Face and hatching of one part after another of a stacked bar.
_FACES = [("#dddddd", ""), (ACCENT, ""), ("white", "////"), (_LIGHT, ""), ("white", "...."), (_GREY, "")]


def stacked_memory(panels: Mapping[str, Mapping[str, Mapping[str, float]]]):
    """What trainings keep in memory: a bar each, made of parts, with the sum behind it; panels have their own scale.

    Args:
        panels: `{title: {training: {part: bytes}}}`, at most six parts. The same part has the same face everywhere.

    Returns:
        The last panel's Axes.
    """
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(part for bars in panels.values() for bar in bars.values() for part in bar))
    faces = dict(zip(parts, _FACES, strict=False))
    rows = [len(bars) for bars in panels.values()]
    figure = Figure(figsize=(7.6, 0.42 * sum(rows) + 0.75 * len(rows) + 0.5), layout="constrained")
    axes = list(figure.subplots(len(rows), height_ratios=[count + 0.6 for count in rows], squeeze=False)[:, 0])
    for ax, (title, bars) in zip(axes, panels.items(), strict=True):
        _stack(new_axes(ax), bars, faces)
        ax.set_title(title, loc="left", fontsize=10)
    handles = [box(0, 0, 1, 1, *faces[part]) for part in parts]
    figure.legend(handles, parts, frameon=False, ncols=min(len(parts), 4), loc="outside upper left")
    return axes[-1]


def _stack(ax, bars: Mapping[str, Mapping[str, float]], faces: Mapping[str, tuple[str, str]]) -> None:
    most = max(sum(parts.values()) for parts in bars.values())
    power = min(int(len(str(int(most))) - 1) // 3, 4)
    unit, label = 1000**power, ("bytes", "kB", "MB", "GB", "TB")[power]
    for place, parts in enumerate(bars.values()):
        left = 0.0
        for part, size in parts.items():
            ax.add_patch(box(left / unit, place - 0.32, size / unit, 0.64, *faces[part]))
            left += size
        ax.text(left / unit + 0.012 * most / unit, place, f"{left / unit:,.3g} {label}", va="center", color=INK)
    ax.set_xlim(0, 1.16 * most / unit)
    ax.set_ylim(len(bars) - 0.5, -0.5)
    ax.set_yticks(range(len(bars)), list(bars))
    ax.grid(axis="x", color="#dddddd", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"memory ({label})")


def against_rank(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]],
    levels: Mapping[str, float] | None = None,
    log: bool = False,
    form: str = "",
):
    """Measured values against the rank, on a logarithmic scale of ranks, a panel for each quantity.

    Args:
        panels: `{label of the vertical axis: {curve: {rank: value}}}`, at most four curves a panel.
        levels: `{name: value}`, horizontal lines in the first panel, such as full fine-tuning's value.
        log: If True the vertical axes are logarithmic, so that a power of the rank is a straight line.
        form: Format of a value beside each of the first curve's points; none by default.

    Returns:
        The last panel's Axes.
    """
    from matplotlib.figure import Figure

    width = 7.0 if len(panels) == 1 else 8.6
    axes = list(Figure(figsize=(width, 3.7), layout="constrained").subplots(1, len(panels), squeeze=False)[0])
    for ax, (label, curves) in zip(axes, panels.items(), strict=True):
        new_axes(ax)
        for (name, points), (colour, line, marker) in zip(curves.items(), _STYLES, strict=False):
            style = {"color": colour, "linestyle": line, "marker": marker, "linewidth": 1.8, "markersize": 5}
            ax.plot(list(points), list(points.values()), label=name, **style)
        ranks = sorted({rank for points in curves.values() for rank in points})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ranks, [str(rank) for rank in ranks])
        if log:
            ax.set_yscale("log")
        ax.set_xlabel("rank (log scale)")
        ax.set_ylabel(label + (" (log scale)" if log else ""))
        if form:
            for rank, value in next(iter(curves.values())).items():
                place = {"textcoords": "offset points", "ha": "left", "fontsize": 9, "color": INK}
                ax.annotate(form.format(value), (rank, value), (4, -12), **place)
    for name, level in (levels or {}).items():
        axes[0].axhline(level, color=INK, linewidth=1.2, linestyle=(0, (1, 1)), label=name)
    for ax in axes:
        ax.legend(frameon=False, fontsize=9)
    return axes[-1]


def loss_against_rate(curves: Mapping[str, Mapping[float, float]], ax=None):
    """Validation loss against the learning rate, with each curve's best rate named.

    Args:
        curves: `{method: {peak learning rate: loss in nats a token}}`, at most four.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    ax = new_axes(ax)
    for (name, points), (colour, line, marker) in zip(curves.items(), _STYLES, strict=False):
        rates = sorted(points)
        values = [points[rate] for rate in rates]
        style = {"color": colour, "linestyle": line, "marker": marker, "linewidth": 1.8, "markersize": 6}
        ax.plot(rates, values, label=name, **style)
        best = min(points, key=lambda rate: points[rate])
        place = {"textcoords": "offset points", "ha": "center", "va": "top", "color": INK, "fontsize": 9}
        ax.annotate(f"best: {best:g}", (best, points[best]), (0, -8), **place)
    ax.set_xscale("log")
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.35, high)
    ticks = [digit * 10.0**power for power in range(-5, 3) for digit in (1, 2, 3, 5)]
    ax.set_yticks([tick for tick in ticks if low / 1.35 <= tick <= high])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.set_xlabel("peak learning rate (log scale)")
    ax.set_ylabel("validation loss (nats a token, log scale)")
    ax.legend(frameon=False)
    return ax


def energy_bands(learned: Mapping[str, Mapping[str, Sequence[float]]], share: float = 0.9, ax=None):
    """How much of an update's energy its strongest directions hold: the median layer, and where most layers lie.

    Args:
        learned: `{name: {"low": …, "median": …, "high": …}}`, each the energy captured, 0 to 1, by 1, 2, …
            directions; at most four names.
        share: Float, the energy at which a horizontal line is drawn.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    ax = new_axes(ax)
    for (name, band), (colour, line, _) in zip(learned.items(), _STYLES, strict=False):
        places = range(1, len(band["median"]) + 1)
        ax.fill_between(places, band["low"], band["high"], color=colour, alpha=0.18, linewidth=0)
        style = {"color": colour, "linestyle": line, "linewidth": 1.8}
        ax.plot(places, band["median"], label=name, **style)
    ax.axhline(share, color=INK, linewidth=1)
    at_left = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 9, "color": INK}
    ax.annotate(f"{share:.0%}", (0.01, share), (0, 4), **at_left)
    ax.set_xscale("log", base=2)
    most = max(len(band["median"]) for band in learned.values())
    ticks = [2**power for power in range(most.bit_length()) if 2**power <= most]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.set_xlabel("number of the strongest directions (log scale)")
    ax.set_ylabel("energy of the update they hold")
    ax.legend(frameon=False, loc="lower right")
    return ax
