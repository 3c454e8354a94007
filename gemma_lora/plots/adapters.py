"""Figures about bottleneck adapters: what is in one, and where two of them stand in a block."""

from __future__ import annotations

from gemma_lora.plots.style import ACCENT, INK, box

_ARROW = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}


def adapter_diagram(width: int, bottleneck: int):
    """One adapter from left to right: d features, m features, d features, and the residual around them.

    Args:
        width: Integer d, the features that go in and come out.
        bottleneck: Integer m, the features in the middle; bars are as high as their features are many.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Polygon

    ax = Figure(figsize=(7.2, 3.1), layout="constrained").add_subplot()
    narrow = max(4 * bottleneck / width, 0.12)
    bars = {
        1: (4, f"h\n{width:,} features"),
        4.5: (narrow, f"middle\n{bottleneck:,} features"),
        8: (4, f"{width:,} features"),
    }
    for left, name in ((1.35, "down_kernel"), (4.85, "up_kernel")):
        heights = (4, narrow) if left < 4 else (narrow, 4)
        corners = [(left, -heights[0] / 2), (left, heights[0] / 2), (left + 3.15, heights[1] / 2)]
        ax.add_patch(Polygon([*corners, (left + 3.15, -heights[1] / 2)], facecolor="#d5e3f3", edgecolor="none"))
        ax.text(left + (0.95 if left < 4 else 2.2), 0, name, ha="center", va="center", fontsize=9, color=INK)
    for x, (height, label) in bars.items():
        ax.add_patch(box(x, -height / 2, 0.35, height, "white" if x != 4.5 else "#0b5394"))
        ax.text(x + 0.175, -2.25 if x != 4.5 else -0.35, label, ha="center", va="top", fontsize=9, color=INK)
    ax.text(4.675, 0.3, "activation", ha="center", va="bottom", fontsize=9, color=INK)
    ax.plot([1.175, 1.175, 9.4], [2, 2.6, 2.6], color=ACCENT, linewidth=3)
    ax.annotate("", (9.4, 0.3), (9.4, 2.65), arrowprops=_ARROW | {"color": ACCENT, "linewidth": 3})
    ax.text(5.2, 2.75, "residual: h itself", ha="center", va="bottom", color=ACCENT)
    ax.annotate("", (9.12, 0), (8.35, 0), arrowprops=_ARROW)
    ax.plot([9.4], [0], marker="o", markersize=17, color="white", markeredgecolor=INK)
    ax.text(9.4, 0, "+", ha="center", va="center", fontsize=13, color=INK)
    ax.annotate("", (1, 0), (0.1, 0), arrowprops=_ARROW)
    ax.annotate("", (10.5, 0), (9.68, 0), arrowprops=_ARROW)
    ax.set_xlim(0, 10.6)
    ax.set_ylim(-3.1, 3.2)
    ax.set_axis_off()
    return ax


def adapted_block():
    """One Gemma 3 block with its two adapters: behind each sub-layer's last projection and before its post-norm.

    Returns:
        The Axes.
    """
    from matplotlib.figure import Figure

    ax = Figure(figsize=(7.6, 2.9), layout="constrained").add_subplot()
    ax.annotate("", (25.4, 0), (0, 0), arrowprops=_ARROW | {"linewidth": 3, "color": ACCENT})
    ax.text(0, -0.3, "residual stream (T, D)", color=ACCENT, va="top")
    for left, name in ((0.8, "attention,\nprojection"), (13.1, "MLP,\nprojection")):
        stops = (
            (0.5, 1.5, "norm", "white"),
            (2.4, 3.1, name, "#dddddd"),
            (5.9, 2.4, "adapter", "#9fc5e8"),
            (8.7, 1.5, "post-\nnorm", "white"),
        )
        ax.plot([left, left], [0, 2.2], color=INK, linewidth=1.4)
        ax.plot([left, left + 10.9], [2.2, 2.2], color=INK, linewidth=1.4, zorder=0)
        ax.annotate("", (left + 10.9, 0.3), (left + 10.9, 2.2), arrowprops=_ARROW)
        for offset, width, text, face in stops:
            ax.add_patch(box(left + offset, 1.5, width, 1.4, face, "" if text != "adapter" else "//"))
            label = {"facecolor": face, "edgecolor": "none", "pad": 1.5} if text == "adapter" else None
            middle = left + offset + width / 2
            ax.text(middle, 2.2, text, ha="center", va="center", fontsize=9, color=INK, bbox=label)
        ax.plot([left + 10.9], [0], marker="o", markersize=15, color="white", markeredgecolor=INK, zorder=5)
        ax.text(left + 10.9, 0, "+", ha="center", va="center", fontsize=12, color=INK, zorder=6)
    ax.set_xlim(-0.3, 25.7)
    ax.set_ylim(-1.1, 3.2)
    ax.set_axis_off()
    return ax
