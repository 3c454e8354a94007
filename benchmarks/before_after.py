"""Draws README's picture: right answers before and after `make finetune`, and one line with both answers.

It reads `results/finetune.json` and writes `docs/before_after.png`.

    python benchmarks/before_after.py
    python benchmarks/before_after.py --output here.png
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SPLITS = {"test": "new lines", "test_unseen": "new merchants\nand sentences", "test_new_locales": "new languages"}


def draw(record: dict[str, Any]):
    """The picture of a run.

    Args:
        record: `metrics` as a job writes them, and `sample`: a test line with `prompt`, `before` and `after`.

    Returns:
        The Axes of the bars; the figure holds the text beside them.
    """
    from matplotlib.figure import Figure

    from gemma_lora.plots.style import ACCENT, INK, new_axes

    figure = Figure(figsize=(9.5, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    ax = new_axes(left)
    ax.grid(False)
    for place, split in enumerate(SPLITS):
        scores = (record["metrics"][when].get(split, {}).get("exact_match") for when in ("before", "after"))
        for offset, color, share in zip((-0.2, 0.2), ("#bbbbbb", ACCENT), scores, strict=True):
            if share is None:
                continue
            ax.barh(place + offset, 100 * share, height=0.36, color=color)
            ax.text(100 * share + 1.5, place + offset, f"{100 * share:.1f} %", va="center", color=INK)
    ax.set_yticks(range(len(SPLITS)), list(SPLITS.values()))
    ax.set(xlim=(0, 115), xlabel="right answers (%)")
    ax.invert_yaxis()
    right.axis("off")
    sample = record["sample"]
    parts = [("The line", sample["prompt"], INK), ("Before, shown four examples", sample["before"], "#777777")]
    parts.append(("After fine-tuning", sample["after"], ACCENT))
    y = 1.0
    for title, text, color in parts:
        lines = textwrap.wrap(text, 52, max_lines=3)
        right.text(0, y, title, weight="bold", va="top", color=color)
        right.text(0, y - 0.09, "\n".join(lines), va="top", color=color, family="monospace", size=9)
        y -= 0.19 + 0.085 * len(lines)
    right.set(xlim=(0, 1), ylim=(0, 1))
    return ax


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/before_after.png")
    chosen = parser.parse_args()
    from gemma_lora.plots.style import save_figure

    save_figure(draw(json.loads((ROOT / "benchmarks/results/finetune.json").read_text())), chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
