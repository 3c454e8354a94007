"""How many examples do I need? Fine-tuning Gemma 3 270M on 25, 50, … and all of the expense lines, with three seeds.

Each run is `gemma-lora finetune`'s training (rank 16 on all linear layers, rows of 384 packed tokens, one pass) on the
first lines of a shuffle of its own, so seeds differ in lines, order and start. Scored teacher-forced on lines of
`validation` and `validation_unseen`: the loss of the answers' tokens, and exact match, the share of answers of which
every token is the most probable one after the right tokens before it. The test splits are not used.
Each run is a process of its own and is written to the JSON when it is done; what is there is not made again.

    python benchmarks/learning_curve.py                   # what is missing: hours, most of them for all lines
    python benchmarks/learning_curve.py --most 800        # up to 800 lines
    python benchmarks/learning_curve.py --list            # the runs, and which are there
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
COUNTS = (25, 50, 100, 200, 400, 800, 1600, 3200, 6000)
SEEDS = (0, 1, 2)
RANK, ROW_LENGTH, SCORED = 16, 384, 100


def chosen_lines(examples: list, count: int, seed: int) -> list:
    """The first `count` of the examples in the order of a seed: a larger set holds the smaller ones of its seed."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order[:count]]


def run_one(count: int, seed: int, rate: float) -> dict[str, Any]:
    """One training in this process, scored."""
    import gemma_lora as gl
    from gemma_lora.base import hardware
    from gemma_lora.data import dataset as data
    from gemma_lora.generation import evaluation

    hardware.use_compilation_cache()
    dataset = gl.load_dataset(ROOT / "data/expenses")
    unseen = data.read_jsonl(ROOT / "data/expenses/validation_unseen.jsonl")
    dataset = dataclasses.replace(dataset, train=chosen_lines(dataset.train, count, seed))
    model = gl.load_gemma()
    gl.apply_lora(model, rank=RANK, targets="all-linear", seed=1000 * seed)
    quick = {"mixed_precision": hardware.has_fast_bfloat16(), "filter_gradient": True}  # as the job does
    tuner = gl.FineTuner(model, learning_rate=rate, row_length=ROW_LENGTH, seed=seed, **quick)
    tuner.fit(dataset, verbose=0, validation_data=False)
    result: dict[str, Any] = {"lines": count, "seed": seed, "steps": len(tuner.log.rows), **quick}
    result |= {"processor": hardware.machine()["processor"], "scores": {}}  # runs may come from several machines
    for split, lines in {"validation": dataset.validation, "validation_unseen": unseen}.items():
        scores = evaluation.teacher_forced(model, lines[:SCORED], dataset.template, ROW_LENGTH)
        result["scores"][split] = {k: round(v, 4) for k, v in dataclasses.asdict(scores).items()}
    return result


def write(path: Path, runs: dict[str, dict], rate: float) -> None:
    """Writes the runs that are there, by lines and seed, with the machine and the versions."""
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    settings = {"rank": RANK, "targets": "all-linear", "learning_rate": rate, "row_length": ROW_LENGTH}
    ordered = {f"{n}/{seed}": runs[f"{n}/{seed}"] for n in COUNTS for seed in SEEDS if f"{n}/{seed}" in runs}
    write_json_atomic(path, {"runs": ordered, "settings": settings, "machine": machine(), "versions": versions()})


def main() -> int:
    """Makes the runs that are missing, small ones first, and writes the JSON after each."""
    from gemma_lora.job.finetuning import Settings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="leave out runs with more lines")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument("--rate", type=float, default=Settings.learning_rate, help="default: the job's, %(default)g")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one for a large accelerator")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/learning_curve.json")
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import one_process

    if chosen.one:
        one_process.report(run_one(*chosen.one, chosen.rate))
        return 0
    record = json.loads(chosen.output.read_text()) if chosen.output.exists() else {"runs": {}}
    runs = record["runs"]
    if runs and record["settings"]["learning_rate"] != chosen.rate:
        there = record["settings"]["learning_rate"]
        print(f"{chosen.output} holds runs at rate {there:g}: move it away, or give --rate {there:g}.", file=sys.stderr)
        return 1
    wanted = [(count, seed) for count in COUNTS if count <= chosen.most for seed in SEEDS]
    if chosen.list:
        for count, seed in wanted:
            print(f"{count}/{seed}", "(done)" if f"{count}/{seed}" in runs else "")
        return 0

    def keep(name: str, result: dict[str, Any]) -> None:
        runs[name] = result
        write(chosen.output, runs, chosen.rate)
        print(name, result["scores"], flush=True)

    rate = ["--rate", str(chosen.rate)]
    missing = [
        (f"{count}/{seed}", [*rate, "--one", str(count), str(seed)])
        for count, seed in wanted
        if f"{count}/{seed}" not in runs
    ]
    return 0 if one_process.measure_all(__file__, missing, keep, chosen.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
