"""Figures of the course in one visual language: readable in black and white, labelled, with units."""

from __future__ import annotations

import os
from collections.abc import Sequence

from gemma_lora.files import atomic_path

#: Dark grey and one blue, told apart by lightness and line style too.
INK, ACCENT = "#222222", "#0b5394"


def _axes(ax=None):
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(7, 3.6), layout="constrained").add_subplot()
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def loss_curve(losses: Sequence[float], ax=None, window: int = 10):
    """Training loss against steps: every step thin, the running mean thick.

    Args:
        losses: One loss a step, in nats a token.
        ax: Matplotlib Axes to draw on; a new figure's by default.
        window: Steps of the running mean.

    Returns:
        The Axes.
    """
    import numpy as np

    ax = _axes(ax)
    values = np.asarray(losses, float)
    steps = np.arange(1, len(values) + 1)
    ax.plot(steps, values, color=INK, linewidth=0.8, alpha=0.5, label="each step")
    if len(values) >= window:
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        ax.plot(steps[window - 1 :], mean, color=ACCENT, linewidth=2.2, label=f"mean of {window} steps")
    ax.set_yscale("log")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("loss (nats a token, log scale)")
    ax.legend(frameon=False)
    return ax


def before_after(before: dict[str, float], after: dict[str, float], ax=None):
    """Exact match before and after, a pair of bars a split.

    Args:
        before, after: `{split: share between 0 and 1}`, the same splits.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    import numpy as np

    ax = _axes(ax)
    names = list(after)
    places = np.arange(len(names))
    for offset, values, face, label in ((-0.2, before, "white", "before"), (0.2, after, ACCENT, "after")):
        bars = ax.bar(
            places + offset,
            [100 * values.get(name, 0.0) for name in names],
            0.38,
            facecolor=face,
            edgecolor=INK,
            hatch="//" if face == "white" else "",
            label=label,
        )
        ax.bar_label(bars, fmt="%.0f", padding=2)
    ax.set_xticks(places, names)
    ax.set_ylim(0, 110)
    ax.set_ylabel("exact match (%)")
    ax.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def save_figure(ax, path: str | os.PathLike) -> None:
    """Writes an Axes' figure as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        ax.figure.savefig(temporary, dpi=150, format="png")


def show(ax, alt: str) -> None:
    """Shows an Axes' figure in a notebook, with alternative text in the output's metadata.

    Args:
        ax: The Axes.
        alt: What the picture shows, for readers who do not see it.
    """
    import io

    from IPython.display import display

    buffer = io.BytesIO()
    ax.figure.savefig(buffer, dpi=110, format="png")
    data = {"image/png": buffer.getvalue(), "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})


def lora_diagram(d_in: int, d_out: int, rank: int, ax=None):
    """LoRA in one picture: the frozen kernel, and the two thin matrices beside it, sides to scale.

    Args:
        d_in, d_out: Integers, rows and columns of the kernel.
        rank: Integer, columns of A and rows of B.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(7, 3.9), layout="constrained").add_subplot()
    gap = 0.16 * d_out
    left = d_out + 2.2 * gap  # where A begins
    boxes = (  # x, y, width, height, face, hatch
        (0, 0, d_out, d_in, "#dddddd", ""),
        (left, 0, rank, d_in, ACCENT, ""),
        (left + rank + 1.2 * gap, d_in - rank, d_out, rank, "white", "////"),
    )
    for x, y, width, height, face, hatch in boxes:
        ax.add_patch(_box(x, y, width, height, face, hatch))
    place = {"ha": "center", "va": "center", "color": INK}
    ax.text(d_out / 2, d_in / 2, f"$W_0$\nfrozen\n{d_in} × {d_out} = {d_in * d_out:,}", **place)
    ax.text(d_out + 1.1 * gap, d_in / 2, r"$+\;\frac{\alpha}{r}\;\cdot$", fontsize=15, **place)
    ax.text(left + rank + 0.6 * gap, d_in - rank / 2, "·", fontsize=18, **place)
    beside = {"ha": "left", "color": INK}
    x = left + rank + 0.2 * gap
    ax.text(x, d_in / 2, f"$A$, trained\n{d_in} × {rank} = {d_in * rank:,}", va="center", **beside)
    below = d_in - rank - 0.05 * d_in
    ax.text(left + rank + 1.2 * gap, below, f"$B$, trained\n{rank} × {d_out} = {rank * d_out:,}", va="top", **beside)
    ax.set_xlim(-0.02 * d_out, left + rank + 1.3 * gap + d_out)
    ax.set_ylim(-0.03 * d_in, 1.03 * d_in)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return ax


def _box(x: float, y: float, width: float, height: float, face: str, hatch: str = ""):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=face, edgecolor=INK, linewidth=1, hatch=hatch)


def parameters_against_rank(ranks: Sequence[int], counts: Sequence[int], full: int, ax=None):
    """Trained parameters against LoRA's rank, beside the number that full fine-tuning would train.

    Args:
        ranks: Ranks.
        counts: Trained parameters at each rank.
        full: Parameters of the kernels that LoRA stands beside.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    ax = _axes(ax)
    ax.plot(ranks, counts, color=ACCENT, marker="o", linewidth=2, label="A and B")
    ax.axhline(full, color=INK, linestyle="--", linewidth=1.5, label="the kernels themselves")
    for rank, count in zip(ranks, counts, strict=True):
        ax.annotate(f"{100 * count / full:.2g} %", (rank, count), (0, -14), textcoords="offset points", ha="left")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(ranks, [str(rank) for rank in ranks])
    ax.set_ylim(min(counts) / 2, full * 2)
    ax.set_xlabel("rank")
    ax.set_ylabel("trained parameters (log scale)")
    ax.legend(frameon=False, loc="center left")
    return ax


def memory_bars(sizes: dict[str, int], ax=None):
    """What things take in memory, a horizontal bar each, on a logarithmic scale with the size written out.

    Args:
        sizes: `{name: bytes}`, drawn from the top.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    ax = _axes(ax)
    names = list(sizes)[::-1]
    bars = ax.barh(names, [sizes[name] for name in names], 0.6, facecolor=ACCENT, edgecolor=INK)
    ax.bar_label(bars, [_bytes(sizes[name]) for name in names], padding=4)
    ax.set_xscale("log", base=1024)
    ticks = [1024**power for power in range(6) if 1024**power <= 1024 * max(sizes.values())]
    ax.set_xticks(ticks, [_bytes(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(min(sizes.values()) / 32, max(sizes.values()) * 32)
    ax.grid(axis="x", color="#dddddd", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("memory (log scale)")
    return ax


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    return ""


def segment_maps(batches: dict[str, Sequence], ax=None):
    """Rows of tokens as strips: which example each token belongs to, and which tokens are padding.

    Args:
        batches: `{title: segment ids (rows, tokens)}`, 1, 2, … for a row's examples and 0 for padding; one panel
            each, drawn from the top on one scale of tokens.
        ax: Matplotlib Axes for a single batch; a new figure with a panel a batch by default.

    Returns:
        The last panel's Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    arrays = {title: np.asarray(ids) for title, ids in batches.items()}
    if ax is None:
        heights = [len(ids) + 1.5 for ids in arrays.values()]
        figure = Figure(figsize=(7, 0.22 * sum(heights) + 1.0), layout="constrained")
        panels = list(figure.subplots(len(arrays), sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    else:
        panels = [ax]
    for panel, (title, ids) in zip(panels, arrays.items(), strict=True):
        _draw_segments(panel, ids)
        panel.set_title(f"{title}: {(ids == 0).mean():.0%} padding", loc="left", fontsize=10)
    panels[-1].set_xlim(0, max(ids.shape[1] for ids in arrays.values()))
    panels[-1].set_xlabel("position in the row (tokens); hatched: padding")
    return panels[-1]


def _draw_segments(ax, ids) -> None:
    import numpy as np

    for row, values in enumerate(ids):
        edges = np.flatnonzero(np.diff(values, prepend=-1, append=-1))
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            number = int(values[start])
            face = "white" if number == 0 else (ACCENT, "#9fc5e8")[number % 2]
            ax.add_patch(_box(start, row - 0.4, end - start, 0.8, face, "" if number else "xxxx"))
            if number:
                colour = "white" if number % 2 == 0 else INK
                ax.text((start + end) / 2, row, str(number), ha="center", va="center", fontsize=8, color=colour)
    ax.set_ylim(len(ids) - 0.4, -0.6)
    ax.set_yticks([])
    ax.set_ylabel("rows")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def attention_mask(mask: Sequence, ax=None):
    """Which token sees which: a dark cell where the row's token may attend to the column's.

    Args:
        mask: (T, T) booleans.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    import numpy as np
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(4.2, 4.2), layout="constrained").add_subplot()
    ax.imshow(np.asarray(mask, float), cmap="Greys", vmin=0, vmax=1.3, interpolation="nearest")
    ax.set_xlabel("token that is seen (position)")
    ax.set_ylabel("token that sees (position)")
    return ax


def share_bars(shares: dict[str, float], counts: dict[str, int], ax=None):
    """Exact match on several splits, with the interval that so many lines leave open.

    The whiskers are Wilson's 95 % interval of a share p among n lines, with z = 1.96:
    `(p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n)`.

    Args:
        shares: `{split: share between 0 and 1}`.
        counts: `{split: lines}`, the same splits.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.

    Reference: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    import numpy as np

    ax = _axes(ax)
    p, n, z = np.array(list(shares.values())), np.array([counts[name] for name in shares]), 1.96
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    whiskers = 100 * np.stack([np.maximum(p - (middle - half), 0), np.maximum(middle + half - p, 0)])
    names = [f"{name}\n{100 * share:.1f} % of {counts[name]} lines" for name, share in shares.items()]
    ax.bar(names, 100 * p, 0.5, facecolor="#9fc5e8", edgecolor=INK)
    ax.errorbar(names, 100 * p, yerr=whiskers, fmt="none", ecolor=INK, elinewidth=1.5, capsize=5)
    ax.set_ylim(0, 110)
    ax.set_ylabel("exact match (%)")
    return ax


class LiveLossCurve:
    """A loss curve in one output of a notebook, drawn anew while training goes on.

    Invariant: the cell holds one picture, however often `update` is called.

    Args:
        alt: What the finished picture shows, for readers who do not see it.
        steps: Integer, the optimizer steps to come; the axis is that long from the start.
    """

    def __init__(self, alt: str, steps: int):
        self.alt, self.steps = alt, steps
        self._handle = None

    def update(self, losses: Sequence[float]) -> None:
        """Draws the losses so far, in nats a token."""
        from IPython.display import display

        ax = loss_curve(losses, window=min(5, len(losses)))
        ax.set_xlim(0, self.steps + 1)
        data, metadata = _picture(ax, self.alt)
        if self._handle is None:
            self._handle = display(data, raw=True, metadata=metadata, display_id=True)
        else:
            self._handle.update(data, raw=True, metadata=metadata)


def _picture(ax, alt: str) -> tuple[dict, dict]:
    """An Axes' figure as a notebook's output: `(data, metadata)`."""
    import io

    buffer = io.BytesIO()
    ax.figure.savefig(buffer, dpi=110, format="png")
    return {"image/png": buffer.getvalue(), "text/plain": alt}, {"image/png": {"alt": alt}}


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
                ax.add_patch(_box(x, row - 0.36, 1, 0.72, face))
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
    ax = _axes(ax)
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

    ax = _axes(ax)
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

    ax = _axes(ax)
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
    ax = _axes(ax)
    ax.plot(x, x, color="#888888", linewidth=1, linestyle="--", label="x")
    ax.plot(x, quantized, color=ACCENT, linewidth=2.2, label="x̂, what goes forward")
    ax.plot(x, gradient, color=INK, linewidth=1.6, linestyle=":", label="slope that goes back")
    ax.set_xlabel("x")
    ax.set_ylabel("value")
    ax.legend(frameon=False, loc="lower right")
    return ax


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
            panel.add_patch(_box(j, i, 1, 1, "#d5e3f3" if value != 0 else "white"))
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
    ax = _axes(ax)
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

    ax = _axes(ax)
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
    ax = _axes(ax)
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
            ax.add_patch(_box(x, top, width, 1, "#d5e3f3" if i % 2 else "white"))
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
        _axes(ax).grid(visible=False)
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
    ax = _axes(ax)
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
            ax.add_patch(_box(x, 1.4, width, 1.2, face))
            ax.text(x + width / 2, 2, text, ha="center", va="center", fontsize=9, color=INK)
        ax.plot([left + 8.8], [0], marker="o", markersize=15, color="white", markeredgecolor=INK)
        ax.text(left + 8.8, 0, "+", ha="center", va="center", fontsize=12, color=INK)
    ax.set_xlim(-0.3, 21)
    ax.set_ylim(-1, 2.9)
    ax.set_axis_off()
    return ax
