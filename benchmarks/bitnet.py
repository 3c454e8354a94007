"""BitNet b1.58 beside its full-precision twin: bits a byte on held-out help topics of Python, for several widths.

Two parts, both with `gemma_lora.byte_model` (2 blocks, windows of 64 bytes, 16 a step, Adam, warm-up and cosine):

    rates     width 64, 300 steps, one seed: the peak learning rate of each kind is chosen by the validation topics
    widths    600 steps at that rate, three seeds: the gap between the kinds against the width

The results are kept after each run, and a run that is there already is not repeated.

    python benchmarks/bitnet.py                   # everything: about 15 minutes on two quiet cores
    python benchmarks/bitnet.py --minutes 5       # as much of it as five minutes hold; call it again to go on
    python benchmarks/bitnet.py --output /dev/shm/trial.json --parts rates
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
KINDS = ("twin", "bitnet")
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
WIDTHS, SEEDS = (16, 32, 64, 128), (0, 1, 2)


def planned(part: str, best: dict[str, float]) -> list[dict]:
    """A part's runs; `best` is each kind's learning rate."""
    if part == "rates":
        rest = {"part": part, "width": 64, "steps": 300, "seed": 0}
        return [{**rest, "kind": kind, "learning_rate": rate} for rate in RATES for kind in KINDS]
    return [
        {"part": part, "width": width, "steps": 600, "seed": seed, "kind": kind, "learning_rate": best[kind]}
        for width in WIDTHS
        for seed in SEEDS
        for kind in KINDS
    ]


def best_rates(runs: list[dict]) -> dict[str, float]:
    """Each kind's learning rate with the fewest bits a byte on the validation topics."""
    trials = [run for run in runs if run["part"] == "rates"]
    return {
        kind: min((run for run in trials if run["kind"] == kind), key=lambda run: run["validation"])["learning_rate"]
        for kind in KINDS
    }


def run_one(run: dict) -> dict:
    """Trains one model, and measures it on both held-out parts."""
    import numpy as np

    from gemma_lora import byte_model
    from gemma_lora.bitnet import BitLinear, NormLinear

    texts = byte_model.read_topics()
    linear = BitLinear if run["kind"] == "bitnet" else NormLinear
    model = byte_model.byte_transformer(linear, width=run["width"], seed=run["seed"])
    start = time.perf_counter()
    losses = byte_model.train(model, texts["train"], run["steps"], run["learning_rate"], seed=run["seed"])
    seconds = time.perf_counter() - start
    scores = {part: round(byte_model.bits_per_byte(model, texts[part]), 4) for part in ("validation", "test")}
    kernels = sum(layer.kernel.value.size for layer in model.layers if isinstance(layer, NormLinear))
    return {
        **run,
        **scores,
        "train": round(float(np.mean(losses[-50:])), 4),  # of the last 50 steps
        "kernel_parameters": kernels,
        "other_parameters": model.count_params() - kernels,
        "seconds": round(seconds, 1),
    }


def main() -> int:
    """Does the runs that are missing, and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("rates", "widths"), default=["rates", "widths"])
    parser.add_argument("--minutes", type=float, default=600, help="no run is begun after so many minutes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/bitnet.json")
    chosen = parser.parse_args()
    from gemma_lora.files import write_json_atomic
    from gemma_lora.hardware import machine
    from gemma_lora.job import versions

    runs = json.loads(chosen.output.read_text())["runs"] if chosen.output.exists() else []
    end = time.monotonic() + 60 * chosen.minutes
    for part in chosen.parts:
        if part != "rates" and sum(run["part"] == "rates" for run in runs) < len(RATES) * len(KINDS):
            print(f"{part}: the part `rates` has to be complete first", file=sys.stderr)
            return 1
        for run in planned(part, best_rates(runs) if part != "rates" else {}):
            if any(run.items() <= done.items() for done in runs):
                continue
            if time.monotonic() > end:
                return 0
            runs.append(run_one(run))
            print({name: runs[-1][name] for name in (*run, "validation", "test", "seconds")}, flush=True)
            record = {"runs": runs, "best_rates": best_rates(runs) if part != "rates" else {}}
            write_json_atomic(chosen.output, record | {"machine": machine(), "versions": versions()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
