"""Figures about matrices, their rank and their singular values."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_lora.plots.style import ACCENT, INK, box, new_axes


def number_matrices(matrices: dict[str, Sequence], columns: int = 3):
    """Small matrices side by side with their numbers written out; cells that are not zero are shaded.

    Args:
        matrices: `{title: (m, n) numbers}`, drawn from the left; what is written is `str(number)`.
        columns: Integer, panels in a row of the figure.

    Returns:
        The last panel's Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    arrays = {title: np.asarray(values, object) for title, values in matrices.items()}
    rows = -(-len(arrays) // columns)
    widest = max(values.shape[1] for values in arrays.values())
    tallest = max(values.shape[0] for values in arrays.values())
    size = (columns * (0.5 * widest + 0.6), rows * (0.42 * tallest + 0.6))
    panels = list(Figure(figsize=size, layout="constrained").subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, (title, values) in zip(panels, arrays.items(), strict=False):
        for (i, j), value in np.ndenumerate(values):
            panel.add_patch(box(j, i, 1, 1, "#d5e3f3" if value != 0 else "white"))
            panel.text(j + 0.5, i + 0.5, str(value).replace("-", "−"), ha="center", va="center", color=INK)
        panel.set_xlim(-0.1, widest + 0.1)
        panel.set_ylim(tallest + 0.1, -0.1)
        panel.set_aspect("equal")
        panel.set_title(title, loc="left", fontsize=10)
    return panels[len(arrays) - 1]


def break_even(d_in: int, d_out: int, ax=None):
    """Numbers in two factors against their rank, beside the matrix's own number, and where the lines cross.

    Args:
        d_in, d_out: Integers, the matrix's shape; ranks go from 0 to the shorter side.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    ax = new_axes(ax)
    most, total = min(d_in, d_out), d_in * d_out
    even = total / (d_in + d_out)
    ax.plot([0, most], [0, most * (d_in + d_out)], color=ACCENT, linewidth=2, label="two factors")
    ax.axhline(total, color=INK, linestyle="--", linewidth=1.5, label=f"the matrix, {d_in} × {d_out}")
    ax.plot([even], [total], color=INK, marker="o", linestyle="none")
    place = {"textcoords": "offset points", "ha": "right", "color": INK}
    ax.annotate(f"break-even: rank {even:.4g}", (even, total), (-8, 8), **place)
    ax.set_xlim(0, most)
    ax.set_ylim(0, None)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_xlabel("rank")
    ax.set_ylabel("numbers to store")
    ax.legend(frameon=False, loc="upper left")
    return ax


def singular_values(spectra: dict[str, Sequence[float]], levels: dict[str, float] | None = None, ax=None):
    """Singular values from the largest down, on a logarithmic scale, a line for each matrix.

    Args:
        spectra: `{name: (k,) singular values}`. A zero has no place on the scale and is left out.
        levels: `{name: value}`, horizontal lines such as a tolerance.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    import numpy as np

    ax = new_axes(ax)
    styles = [(ACCENT, "-", "o"), (INK, "--", "s"), ("#6fa8dc", "-.", "^"), ("#777777", ":", "D")]
    for i, (name, spectrum) in enumerate(spectra.items()):
        colour, line, marker = styles[i % len(styles)]
        values = np.where(np.asarray(spectrum, float) > 0, spectrum, np.nan)
        places = np.arange(1, len(values) + 1)
        ax.plot(places, values, color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.5, label=name)
    for name, level in (levels or {}).items():
        ax.axhline(level, color=INK, linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        ax.annotate(name, (0.99, level), (0, 3), fontsize=9, color=INK, ha="right", **place)
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("number of the singular value, from the largest")
    ax.set_ylabel("singular value (log scale)")
    if len(spectra) > 1:
        ax.legend(frameon=False)
    return ax


def pictures(images: dict[str, Sequence], columns: int = 3):
    """Matrices as grey pictures side by side, 0 black and 1 white.

    Args:
        images: `{title: (height, width) numbers}`; what lies outside 0 to 1 is drawn as black or white.
        columns: Integer, pictures in a row of the figure.

    Returns:
        The last picture's Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    arrays = {title: np.asarray(values, float) for title, values in images.items()}
    rows = -(-len(arrays) // columns)
    height, width = next(iter(arrays.values())).shape
    size = (2.4 * columns, rows * (2.3 * height / width + 0.35))
    panels = list(Figure(figsize=size, layout="constrained").subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, (title, values) in zip(panels, arrays.items(), strict=False):
        panel.imshow(values, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        panel.set_title(title, loc="left", fontsize=10)
    return panels[len(arrays) - 1]


def error_against_rank(measured: dict[int, float], predicted: Sequence[float], ax=None):
    """Error of an approximation against its rank: measured at some ranks, predicted at all.

    Args:
        measured: `{rank: error}`, relative to the matrix's norm.
        predicted: (k + 1,) relative errors at ranks 0 to k.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    ax = new_axes(ax)
    ax.plot(range(len(predicted)), predicted, color=INK, linewidth=1.2, label="from the dropped singular values")
    style = {"color": ACCENT, "marker": "o", "markersize": 7, "linestyle": "none", "markerfacecolor": "none"}
    ax.plot(list(measured), list(measured.values()), markeredgewidth=2, label="measured", **style)
    for rank, error in measured.items():
        ax.annotate(f"{100 * error:.2g} %", (rank, error), (8, 5), textcoords="offset points", color=INK)
    ax.set_ylim(0, None)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.set_xlabel("rank")
    ax.set_ylabel("error, of the picture's norm")
    ax.legend(frameon=False)
    return ax
