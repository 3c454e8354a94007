"""BitNet b1.58 beside its full-precision twin: bits a byte on held-out help topics of Python, for several widths.

Three parts, all with `gemma_lora.byte_model` (2 blocks, windows of 64 bytes, 16 a step, Adam, warm-up and cosine):

    rates     width 64, 200 steps, one seed: which peak learning rates suit which kind
    widths    400 steps, one seed, three widths, each with half the best of these rates, that rate, and twice as much
    seeds     two more seeds of each kind and width, at the rate that was best there

The validation topics choose; the test topics are only written down. The results are kept after each run, and a run
that is there already is not repeated.

    python benchmarks/bitnet.py                   # everything: about 10 minutes on two quiet cores
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
WIDTHS, FACTORS, MORE_SEEDS = (16, 32, 64), (1.0, 0.5, 2.0), (1, 2)
PARTS = ("rates", "widths", "seeds")


def best_rate(runs: list[dict], part: str, kind: str, width: int) -> float:
    """The learning rate with the fewest bits a byte on the validation topics, among a part's runs."""
    trials = [run for run in runs if (run["part"], run["kind"], run["width"]) == (part, kind, width)]
    return min(trials, key=lambda run: run["validation"])["learning_rate"]


def planned(part: str, runs: list[dict]) -> list[dict]:
    """A part's runs, given those of the parts before it."""
    plan = []
    for kind in KINDS:
        if part == "rates":
            settings = [(64, 200, 0, rate) for rate in RATES]
        elif part == "widths":
            middle = best_rate(runs, "rates", kind, 64)
            settings = [(width, 400, 0, middle * factor) for width in WIDTHS for factor in FACTORS]
        else:
            chosen = {width: best_rate(runs, "widths", kind, width) for width in WIDTHS}
            settings = [(width, 400, seed, chosen[width]) for width in WIDTHS for seed in MORE_SEEDS]
        names = ("width", "steps", "seed", "learning_rate")
        plan += [{"part": part, "kind": kind, **dict(zip(names, setting, strict=True))} for setting in settings]
    return sorted(plan, key=lambda run: run["width"])


def chosen_rates(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Each kind's best rate: `{kind: {"64, 200 steps": rate, "16": rate, …}}`, as far as the runs go."""
    found: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for run in runs:
        if run["part"] != "seeds":
            key = "64, 200 steps" if run["part"] == "rates" else str(run["width"])
            found[run["kind"]][key] = best_rate(runs, run["part"], run["kind"], run["width"])
    return found


def run_one(run: dict) -> dict:
    """Trains one model, and measures it on both held-out parts."""
    import numpy as np

    from gemma_lora.course import byte_model
    from gemma_lora.layers.bitnet import BitLinear, NormLinear

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


def is_done(run: dict, runs: list[dict]) -> bool:
    """Whether a planned run is among those that are finished."""
    return any(run.items() <= done.items() for done in runs)


def main() -> int:
    """Does the runs that are missing, and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in this order")
    parser.add_argument("--minutes", type=float, default=600, help="no run is begun after so many minutes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/bitnet.json")
    chosen = parser.parse_args()
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    runs = json.loads(chosen.output.read_text())["runs"] if chosen.output.exists() else []
    end = time.monotonic() + 60 * chosen.minutes
    for part in sorted(chosen.parts, key=PARTS.index):
        before = PARTS[: PARTS.index(part)]
        if missing := [run for other in before for run in planned(other, runs) if not is_done(run, runs)]:
            print(f"{part}: {len(missing)} runs of {', '.join(before)} have to be done first", file=sys.stderr)
            return 1
        for run in planned(part, runs):
            if is_done(run, runs):
                continue
            if time.monotonic() > end:
                return 0
            runs.append(run_one(run))
            print({name: runs[-1][name] for name in (*run, "validation", "test", "seconds")}, flush=True)
            record = {"runs": runs, "best_rates": chosen_rates(runs)}
            write_json_atomic(chosen.output, record | {"machine": machine(), "versions": versions()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
