"""Figures about LoRA, packed rows, losses and scores."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_lora.plots.style import ACCENT, INK, box, new_axes, picture


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

    ax = new_axes(ax)
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
        data, metadata = picture(ax, self.alt)
        if self._handle is None:
            self._handle = display(data, raw=True, metadata=metadata, display_id=True)
        else:
            self._handle.update(data, raw=True, metadata=metadata)


def before_after(before: dict[str, float], after: dict[str, float], ax=None):
    """Exact match before and after, a pair of bars a split.

    Args:
        before, after: `{split: share between 0 and 1}`, the same splits.
        ax: Matplotlib Axes; a new figure's by default.

    Returns:
        The Axes.
    """
    import numpy as np

    ax = new_axes(ax)
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
        ax.add_patch(box(x, y, width, height, face, hatch))
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
    ax = new_axes(ax)
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
    ax = new_axes(ax)
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
            ax.add_patch(box(start, row - 0.4, end - start, 0.8, face, "" if number else "xxxx"))
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

    ax = new_axes(ax)
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
