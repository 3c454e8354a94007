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
    ax.legend(frameon=False, loc="upper right")
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
