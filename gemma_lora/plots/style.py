"""What every figure shares: two inks, Axes, and how a figure gets into a file or a notebook."""

from __future__ import annotations

import os

from gemma_lora.base.files import atomic_path

#: Dark grey and one blue, told apart by lightness and line style too.
INK, ACCENT = "#222222", "#0b5394"


def new_axes(ax=None):
    """The given Axes, or a new figure's, in the course's style: two spines, a light horizontal grid."""
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(7, 3.6), layout="constrained").add_subplot()
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def box(x: float, y: float, width: float, height: float, face: str, hatch: str = ""):
    """A rectangle with its lower left corner at `(x, y)`, in the Axes' data units, to add with `add_patch`."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=face, edgecolor=INK, linewidth=1, hatch=hatch)


def picture(ax, alt: str) -> tuple[dict, dict]:
    """An Axes' figure as a notebook's output: `(data, metadata)`."""
    import io

    buffer = io.BytesIO()
    ax.figure.savefig(buffer, dpi=110, format="png")
    return {"image/png": buffer.getvalue(), "text/plain": alt}, {"image/png": {"alt": alt}}


def save_figure(ax, path: str | os.PathLike) -> None:
    """Writes an Axes' figure, whole or not at all: as SVG where the name ends so, else as PNG."""
    kind = "svg" if os.fspath(path).lower().endswith(".svg") else "png"
    with atomic_path(path) as temporary:
        ax.figure.savefig(temporary, dpi=150, format=kind)


def show(ax, alt: str) -> None:
    """Shows an Axes' figure in a notebook, with alternative text in the output's metadata.

    Args:
        ax: The Axes.
        alt: What the picture shows, for readers who do not see it.
    """
    from IPython.display import display

    data, metadata = picture(ax, alt)
    display(data, raw=True, metadata=metadata)
