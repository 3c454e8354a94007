"""What a LoRA step of Gemma 3 270M costs against sequence length, batch, rank and vocabulary: time and peak memory.

One setting is changed at a time, from rank 8 on query and value, one row of 256 tokens that all carry loss, float32 and
the full vocabulary of 262,144. One process each: three steps, of which the fastest counts, and the process's peak.
A smaller vocabulary is the first rows of the embedding, cut from the whole, which that process has held: its peak
tells nothing and is not drawn. Where nothing else ran, compare times; peaks always.
Each setting is written to the JSON when it is measured, and not measured again; the picture is drawn at the end.

    python benchmarks/scaling.py              # what is missing, then the picture
    python benchmarks/scaling.py --draw       # the picture only
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
START = {"length": 256, "rows": 1, "rank": 8, "vocabulary": 262_144}
VALUES = {
    "length": (64, 128, 256, 512, 1024),
    "rows": (1, 2, 4, 8),
    "rank": (1, 8, 64, 256),
    "vocabulary": (16_384, 65_536, 262_144),
}
LABELS = {
    "length": "tokens a row",
    "rows": "rows of 256 tokens",
    "rank": "rank, query and value",
    "vocabulary": "entries of the vocabulary",
}


def settings() -> list[dict[str, int]]:
    """Every setting once: the starting point belongs to all four lines."""
    found = []
    for name, values in VALUES.items():
        found += [START | {name: value} for value in values]
    return [setting for place, setting in enumerate(found) if setting not in found[:place]]


def key_of(setting: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in setting.items())


def with_vocabulary(model, size: int):
    """The model with the first `size` rows of its embedding."""
    from gemma_lora.gemma import load as gemma

    backbone = model.backbone
    if size == backbone.vocabulary_size:
        return model
    hub = gemma.import_keras_hub()
    small = type(backbone)(**backbone.get_config() | {"vocabulary_size": size, "name": None})
    for new, old in zip(small.variables, backbone.variables, strict=True):
        new.assign(old.value[: new.shape[0]])
    return hub.models.Gemma3CausalLM(backbone=small, preprocessor=None)


def measure(setting: dict[str, int]) -> dict[str, Any]:
    """Trains three steps in this process."""
    import numpy as np

    import gemma_lora as gl
    from gemma_lora.base import hardware

    hardware.use_compilation_cache()
    model = with_vocabulary(gl.load_gemma(), setting["vocabulary"])
    gl.apply_lora(model, rank=setting["rank"], targets=("query", "value"))
    tuner = gl.FineTuner(model, rows=setting["rows"], row_length=setting["length"], chunk_size=256)
    tuner.compile_for(100)
    shape = (setting["rows"], setting["length"])
    ids = np.random.default_rng(0).integers(10, setting["vocabulary"], shape).astype("int32")
    x, weights = {"token_ids": ids, "padding_mask": np.ones_like(ids)}, np.ones(shape, "float32")
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        tuner.train_on_batch(x, np.roll(ids, -1, axis=1), weights)
        seconds.append(round(time.perf_counter() - started, 3))
    return {**setting, "step_seconds": seconds[1:], "peak_bytes": hardware.peak_memory_bytes()}


def draw(runs: dict[str, dict], path: Path) -> None:
    """Four columns, what was changed; two rows, the fastest step and, but for the vocabulary, the peak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(13, 5.5), sharey="row", layout="constrained")
    for column, (name, values) in enumerate(VALUES.items()):
        done = [runs[key_of(START | {name: value})] for value in values if key_of(START | {name: value}) in runs]
        x = [run[name] for run in done]
        rows = ([min(run["step_seconds"]) for run in done], [run["peak_bytes"] / 1e9 for run in done])
        if name == "vocabulary":  # its peaks tell nothing
            rows = rows[:1]
            axes[1, column].set_axis_off()
        for ax, y, colour in zip(axes[:, column], rows, ("tab:blue", "tab:orange"), strict=False):
            ax.plot(x, y, "o-", color=colour)
            ax.set_xlim(left=0)
            ax.set_xticks(x[1:] if len(x) < 5 else x[2:])  # the small ones would stand on one another
            ax.xaxis.set_major_formatter("{x:,.0f}")
            ax.grid(alpha=0.3)
        axes[len(rows) - 1, column].set_xlabel(LABELS[name])
    for ax in axes[:, 0]:
        ax.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("fastest step (s)")
    axes[1, 0].set_ylabel("peak of the process (GB)")
    figure.suptitle(
        "A LoRA step of Gemma 3 270M in float32. One setting changes; the others: rank 8, one row of 256 tokens, "
        "262,144 entries"
    )
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measures what is missing, writes the JSON after each setting, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import one_process

    if chosen.one:
        one_process.report(measure(chosen.one))
        return 0
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    runs = json.loads(chosen.output.read_text())["runs"] if chosen.output.exists() else {}
    for setting in [] if chosen.draw else settings():
        if key_of(setting) in runs:
            continue
        result = one_process.measure(__file__, "--one", json.dumps(setting))
        if result is None:
            return 1
        runs[key_of(setting)] = result
        write_json_atomic(chosen.output, {"runs": runs, "machine": machine(), "versions": versions()})
        print(key_of(setting), result["step_seconds"], f"{result['peak_bytes'] / 1e9:.2f} GB", flush=True)
    draw(runs, chosen.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
