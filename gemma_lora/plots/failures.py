"""Figures about trainings that go wrong without a word: what moves, which way is down, what carries loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemma_lora.plots.style import ACCENT, INK, box, new_axes

_LIGHT = "#9fc5e8"


def moved_bars(panels: Mapping[str, Mapping[str, float]], wanted: Sequence[str]):
    """Which weights a training has changed: a bar each, as long as the share of its numbers that are others now.

    Args:
        panels: `{title: {weight: share between 0 and 1}}`, a panel each, the same weights in all.
        wanted: The weights that should move; their bars are filled, the others' hatched.

    Returns:
        The last panel's Axes.
    """
    from matplotlib.figure import Figure

    names = list(next(iter(panels.values())))
    figure = Figure(figsize=(2.2 + 2.9 * len(panels), 0.3 * len(names) + 1.3), layout="constrained")
    axes = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for ax, (title, shares) in zip(axes, panels.items(), strict=True):
        new_axes(ax).grid(visible=False)
        ax.grid(axis="x", color="#dddddd", linewidth=0.8)
        for place, name in enumerate(names):
            face, hatch = (ACCENT, "") if name in wanted else ("white", "////")
            ax.add_patch(box(0, place - 0.35, 100 * shares[name], 0.7, face, hatch))
            ax.text(100 * shares[name] + 2, place, f"{100 * shares[name]:.0f}", va="center", fontsize=8, color=INK)
        ax.set_xlim(0, 118)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_xticks([0, 50, 100])
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel("numbers that moved (%)")
        ax.set_title(title, loc="left", fontsize=10)
    handles = [box(0, 0, 1, 1, ACCENT), box(0, 0, 1, 1, "white", "////")]
    figure.legend(handles, ["should move", "should not"], frameon=False, ncols=2, loc="outside upper right")
    return axes[-1]


def along_gradient(panels: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]):
    """The loss on a walk along its gradient, beside what the gradient promises.

    Args:
        panels: `{title: (steps, losses measured, losses promised)}`.

    Returns:
        The last panel's Axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 3.4 * len(panels), 3.3), layout="constrained")
    axes = list(figure.subplots(1, len(panels), squeeze=False)[0])
    for ax, (title, (steps, measured, promised)) in zip(axes, panels.items(), strict=True):
        new_axes(ax)
        ax.plot(steps, promised, color=INK, linestyle="--", linewidth=1.5, label="what the gradient says")
        ax.plot(steps, measured, color=ACCENT, marker="o", markersize=4, linewidth=1.8, label="measured")
        ax.set_xticks([steps[0], 0, steps[-1]])
        ax.set_xlabel("step along the gradient")
        ax.set_ylabel("loss (nats a token)")
        ax.set_title(title, loc="left", fontsize=10)
        ax.legend(frameon=False, fontsize=9)
    return axes[-1]


def dropped_units(panels: Mapping[str, Sequence[Sequence[float]]]):
    """Which units dropout takes away in each step: a row a step, dark where the unit is kept.

    Args:
        panels: `{title: (steps, units) of 0 and 1}`.

    Returns:
        The last panel's Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.6 + 3.4 * len(panels), 2.6), layout="constrained")
    axes = list(figure.subplots(1, len(panels), squeeze=False)[0])
    for ax, (title, kept) in zip(axes, panels.items(), strict=True):
        array = np.asarray(kept, float)
        ax.imshow(array, cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest", aspect="auto")
        ax.set_yticks(range(len(array)), [str(step + 1) for step in range(len(array))])
        ax.set_xlabel("unit (white: dropped)")
        ax.set_ylabel("step")
        ax.set_title(title, loc="left", fontsize=10)
    return axes[-1]


def marked_rows(rows: Mapping[str, Sequence[tuple[str, bool]]]):
    """Rows of tokens, a box each; dark where the token carries loss.

    Args:
        rows: `{label: [(token, whether it carries loss)]}`, as `health.pieces` gives them; the label stands above.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    ax = Figure(figsize=(7.6, 0.62 * len(rows) + 0.2), layout="constrained").add_subplot()
    widest = 36.0
    for number, (label, row) in enumerate(rows.items()):
        top, x = 2.3 * number, 0.0
        ax.text(0, top - 0.15, label, fontsize=9, color=INK, va="bottom")
        for piece, carries in row:
            width = 1.0 if len(piece) == 1 else 0.68 * len(piece)
            ax.add_patch(box(x, top, width, 1, ACCENT if carries else "white"))
            ink = "white" if carries else INK
            ax.text(x + width / 2, top + 0.5, piece.replace("▁", "␣"), ha="center", va="center", fontsize=8, color=ink)
            x += width
        widest = max(widest, x)
    ax.set_xlim(-0.3, widest + 0.3)
    ax.set_ylim(2.3 * len(rows) - 1.1, -1)
    ax.set_axis_off()
    return ax


def check_grid(found: Mapping[str, Mapping[str, bool]]):
    """Which check catches which slip: a cross where a check says no.

    Args:
        found: `{training: {check: whether it found nothing wrong}}`, the same checks in all.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    checks = list(next(iter(found.values())))
    size = (2.6 + 0.95 * len(checks), 1.5 + 0.36 * len(found))
    ax = Figure(figsize=size, layout="constrained").add_subplot()
    for row, fine in enumerate(found.values()):
        for column, check in enumerate(checks):
            ax.add_patch(box(column - 0.5, row - 0.5, 1, 1, "white" if fine[check] else ACCENT))
            mark, colour = ("✓", "#777777") if fine[check] else ("✗", "white")
            ax.text(column, row, mark, ha="center", va="center", color=colour, fontsize=11)
    ax.set_xlim(-0.5, len(checks) - 0.5)
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_yticks(range(len(found)), list(found))
    ax.set_xticks(range(len(checks)), [check.replace(" ", "\n", 1) for check in checks], fontsize=9)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    for side in ax.spines.values():
        side.set_visible(False)
    return ax
