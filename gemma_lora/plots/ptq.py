"""Figures about what quantization does to a model: accuracy, decisions, weights between codes, perplexity."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_lora.plots.style import ACCENT, INK, box, new_axes

#: Line, marker and ink of each curve in turn, told apart without colour.
_STYLES = ((INK, "-", "o"), (ACCENT, "--", "s"), ("#6fa8dc", "-.", "^"), ("#777777", ":", "D"))


def integer_layer(input_bits: int = 8, weight_bits: int = 8):
    """A linear layer in integers: codes of x and of W, their product in int32, and one multiplication by a float.

    Args:
        input_bits, weight_bits: Integers, of a code of x and of W.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    ax = Figure(figsize=(7.6, 2.5), layout="constrained").add_subplot()
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    stops = (  # left, bottom, width, text, face
        (0, 2.3, 3.4, f"codes of x\nuint{input_bits}", "#d5e3f3"),
        (0, 0, 3.4, f"codes of W\nint{weight_bits}", "#d5e3f3"),
        (5, 1.15, 3.6, "sums of products\nint32", "white"),
        (10, 1.15, 6, "− zero point · Σ codes of W\n+ code of the bias, int32", "white"),
        (17.4, 1.15, 2.8, r"$\cdot\; s_x s_W$" + "\nfloat32", "#dddddd"),
    )
    for left, bottom, width, text, face in stops:
        ax.add_patch(box(left, bottom, width, 1.3, face))
        ax.text(left + width / 2, bottom + 0.65, text, ha="center", va="center", fontsize=9, color=INK)
    for start, end in (((3.4, 2.95), (5, 2.1)), ((3.4, 0.65), (5, 1.5)), ((8.6, 1.8), (10, 1.8))):
        ax.annotate("", end, start, arrowprops=arrow)
    ax.annotate("", (17.4, 1.8), (16, 1.8), arrowprops=arrow)
    ax.annotate("", (21.6, 1.8), (20.2, 1.8), arrowprops=arrow)
    ax.text(21.8, 1.8, "y", ha="left", va="center", color=INK)
    ax.set_xlim(-0.2, 22.4)
    ax.set_ylim(-0.2, 3.8)
    ax.set_axis_off()
    return ax


def accuracy_against_bits(curves: dict[str, dict[int, Sequence[float]]], level: float | None = None, ax=None):
    """Accuracy against bits a weight: a line through the means over seeds, whiskers from the worst seed to the best.

    Args:
        curves: `{name: {bits: a share between 0 and 1 for each seed}}`, at most four curves.
        level: A share to draw as a horizontal line: the float model's.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    import numpy as np

    ax = new_axes(ax)
    widths = sorted({bits for shares in curves.values() for bits in shares}, reverse=True)
    for number, ((name, shares), (colour, line, marker)) in enumerate(zip(curves.items(), _STYLES, strict=False)):
        bits = [width for width in widths if width in shares]
        places = [widths.index(width) + 0.07 * (number - (len(curves) - 1) / 2) for width in bits]  # side by side
        values = 100 * np.array([shares[width] for width in bits], float)  # (widths, seeds)
        mean = values.mean(axis=1)
        whiskers = np.stack([mean - values.min(axis=1), values.max(axis=1) - mean])
        style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 6, "linewidth": 1.8}
        ax.errorbar(places, mean, yerr=whiskers, capsize=4, elinewidth=1.2, label=name, **style)
    if level is not None:
        ax.axhline(100 * level, color="#777777", linewidth=1.2, linestyle=(0, (6, 2)), label="float32")
    ax.set_xticks(range(len(widths)), [str(width) for width in widths])
    ax.set_xlim(-0.4, len(widths) - 0.6)
    ax.set_xlabel("bits of a weight's code")
    ax.set_ylabel("accuracy (%)")
    ax.legend(frameon=False, loc="lower left")
    return ax


def decisions(images: Sequence, probabilities: dict[str, Sequence], truth: Sequence[int]):
    """What several models make of some pictures: the picture, and a strip of bars a model, a bar for each class.

    Args:
        images: (n, height, width) numbers, 0 drawn white and the largest black.
        probabilities: `{model: (n, classes) probabilities}`, drawn from the top.
        truth: (n,) right classes; the right one's number is marked under the bars.

    Returns:
        The last Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    rows, columns = len(probabilities) + 1, len(images)
    figure = Figure(figsize=(1.9 * columns + 0.8, 1.0 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for column, image in enumerate(images):
        axes[0, column].imshow(image, cmap="Greys", interpolation="nearest")
        axes[0, column].set_title(f"a {truth[column]}", fontsize=10)
        axes[0, column].set_axis_off()
    for row, (name, table) in enumerate(probabilities.items(), start=1):
        for column, values in enumerate(np.asarray(table, float)):
            ax = new_axes(axes[row, column])
            right = np.arange(len(values)) == truth[column]
            faces = [ACCENT if here else "white" for here in right]
            ax.bar(range(len(values)), values, 0.75, color=faces, edgecolor=INK, linewidth=0.8)
            ax.set_ylim(0, 1.05)
            ax.set_xticks(range(len(values)), [str(i) for i in range(len(values))] if row == rows - 1 else [])
            ax.set_yticks([0, 1], ["0", "1"] if column == 0 else [])
            ax.tick_params(labelsize=8)
        axes[row, 0].set_ylabel(name, fontsize=9)
    figure.supxlabel("digit (filled: the right one); bars are probabilities", fontsize=10)
    return axes[-1, -1]


def code_histograms(panels: dict[str, Sequence[float]], codes: Sequence[int], xlabel: str):
    """Weights between codes: a histogram a panel, solid lines at the codes and dotted ones where rounding turns over.

    Args:
        panels: `{title: weights over their scale}`, drawn from the top on one axis.
        codes: The codes, ascending.
        xlabel: What the numbers are, with their unit.

    Returns:
        The last panel's Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.75 * len(panels) + 0.5), layout="constrained")
    axes = list(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0])
    ends = (min(codes) - 0.2, max(codes) + 0.2)
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        new_axes(ax).hist(np.ravel(values), bins=np.linspace(*ends, 81), facecolor="#9fc5e8", edgecolor="#6b8fb3")
        for code in codes:
            ax.axvline(code, color=INK, linewidth=1.6, label="a code" if code == codes[0] else None)
        for edge in np.add(codes[:-1], codes[1:]) / 2:
            first = edge == (codes[0] + codes[1]) / 2
            ax.axvline(edge, color=INK, linestyle=":", linewidth=1.4, label="half-way" if first else None)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_ylabel("weights")
    axes[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes[-1].set_xlim(*ends)
    axes[-1].set_xticks(codes)
    axes[-1].set_xlabel(xlabel)
    return axes[-1]


def perplexity_against_size(
    curves: dict[str, dict[str, tuple[float, float]]], level: float, top: float, xlabel: str, ax=None
):
    """Perplexity against size, a marker shape for each way of grouping scales, the format written beside it.

    Args:
        curves: `{group: {format: (size, perplexity)}}`, at most four groups.
        level: The reference's perplexity, a horizontal line.
        top: The largest perplexity on the axis; what lies above is drawn at the edge as an arrow with its number.
        xlabel: The size, with its unit.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    ax = new_axes(ax)
    written: list[tuple[str, float, float]] = []
    for (group, points), (colour, _, marker) in zip(curves.items(), _STYLES, strict=False):
        inside = {name: point for name, point in points.items() if point[1] <= top}
        style = {"color": colour, "marker": marker, "markersize": 7, "linestyle": "none", "markeredgecolor": INK}
        ax.plot([x for x, _ in inside.values()], [y for _, y in inside.values()], label=group, **style)
        for name, (size, perplexity) in points.items():
            place = {"textcoords": "offset points", "fontsize": 9, "color": INK}
            if any(
                name == other and abs(x / size - 1) < 0.1 and 0.8 < y / perplexity < 1.25 for other, x, y in written
            ):
                continue  # the same format at nearly the same place is named once
            written.append((name, size, perplexity))
            if name in inside:
                ax.annotate(name, (size, perplexity), (7, 4), **place)
            else:
                ax.plot([size], [top], color=colour, marker=marker, markersize=7, markeredgecolor=INK)
                ax.annotate(f"{name}: {perplexity:,.0f} ↑" if perplexity < 1e6 else f"{name}: {perplexity:.0e} ↑",
                            (size, top), (8, -4), **place)  # fmt: skip
    ax.axhline(level, color="#777777", linewidth=1.2, linestyle=(0, (6, 2)), label="float32")
    ax.set_yscale("log")
    ax.set_ylim(level / 1.1, top * 1.12)
    ticks = [tick for tick in (40, 50, 60, 80, 100, 150, 200, 300, 500, 1000) if tick < top]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlim(0, 1.12 * max(size for points in curves.values() for size, _ in points.values()))
    ax.set_xlabel(xlabel)
    ax.set_ylabel("perplexity (log scale)")
    ax.legend(frameon=False, loc="upper right")
    return ax
