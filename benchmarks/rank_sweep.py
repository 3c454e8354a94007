"""How to choose LoRA's rank, its targets and its learning rate: short trainings of Gemma 3 270M on the expenses.

Two questions, a group of runs each; a group's runs see the same training lines once, in rows of 256 tokens:

  rank-…   rank 1, 4, 16, 64 on all linear layers and rank 4, 16 on query and value, alpha 32, one learning rate;
           rank 16 with two more seeds
  rate-…   rank 16 on all linear layers, and full fine-tuning of every weight, at several learning rates; shorter

Measured on the first lines of `validation` and, but for rates, of `validation_unseen`, never on a test split: the loss
of the answer's tokens, and teacher-forced exact match, the share of answers of which every token is the most probable
one after the right tokens before it. Each run is a process of its own and is written to the JSON when it is done; runs
that are there are not made again.

    python benchmarks/rank_sweep.py                                  # what is missing: about 75 minutes on two cores
    python benchmarks/rank_sweep.py --list                           # the names of the runs
    python benchmarks/rank_sweep.py --only rank-16-all rank-4-qv     # these two
    python benchmarks/rank_sweep.py --output other.json              # begin anew, somewhere else
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
ALPHA, ROW_LENGTH, RATE = 32, 256, 5e-4
#: Training lines, and the lines of each validation split, by group.
LINES = {"rank": 160, "rate": 80}
VALIDATION = {"rank": 60, "rate": 48}


def settings_of(group: str, rank: int | None = 16, targets: str | None = "all", rate: float = RATE, seed: int = 0):
    """Settings of a run: LoRA with `targets` "all" or "qv", or, without a rank, full fine-tuning."""
    method = "full" if rank is None else "lora"
    named = {"rank": rank, "targets": targets, "rate": rate, "seed": seed}
    return {"group": group, "method": method, **named, "lines": LINES[group]}


RUNS = {f"rank-{rank}-all": settings_of("rank", rank) for rank in (16, 1, 4, 64)}
RUNS |= {f"rank-{rank}-qv": settings_of("rank", rank, "qv") for rank in (4, 16)}
RUNS |= {f"rate-lora-{rate:g}": settings_of("rate", rate=rate) for rate in (1.5e-4, 5e-4, 1.5e-3, 5e-3)}
RUNS |= {f"rate-full-{rate:g}": settings_of("rate", None, None, rate) for rate in (5e-6, 1.5e-5, 5e-5, 1.5e-4, 5e-4)}
RUNS |= {f"rank-16-all-seed-{seed}": settings_of("rank", seed=seed) for seed in (1, 2)}


def train(model, dataset, settings: dict) -> dict:
    """Fine-tunes a model in place, and says what it cost."""
    import short_training

    import gemma_lora as gl

    if settings["method"] == "lora":
        targets = "all-linear" if settings["targets"] == "all" else ("query", "value")
        gl.apply_lora(model, settings["rank"], ALPHA, targets, seed=1000 * settings["seed"])
    named = {"learning_rate": settings["rate"], "row_length": ROW_LENGTH, "seed": settings["seed"]}
    tuner = gl.FineTuner(model, mixed_precision=True, **named)
    if error := short_training.fit(tuner, dataset, settings["lines"]):
        return {"failed": error}
    seconds = [row["seconds"] for row in tuner.log.rows]
    return {
        "trained_parameters": short_training.trained_parameters(model),
        "steps": len(seconds),
        "median_step_seconds": round(statistics.median(seconds), 3),
        "training_seconds": round(statistics.median(seconds) * len(seconds), 1),  # without compiling
        "losses": [round(row["loss"], 4) for row in tuner.log.rows],
    }


def spectra(model) -> dict:
    """How the updates are made up: the energy that the k strongest directions hold, over all layers, k from 1."""
    import numpy as np

    from gemma_lora import lora
    from gemma_lora.lora import low_rank

    energy = []
    for layer in lora.lora_layers(model):
        values = low_rank.spectrum_of_update(layer.lora_a, layer.lora_b, layer.scaling)
        energy.append([low_rank.energy_captured(values, k) for k in range(1, len(values) + 1)])
    quantiles = np.quantile(energy, [0.1, 0.5, 0.9], axis=0).round(4)
    needed = [int(np.argmax(np.array(layer) >= 0.9)) + 1 for layer in energy]
    return {
        "energy_quantiles": dict(zip(("0.1", "0.5", "0.9"), quantiles.tolist(), strict=True)),
        "directions_for_90_percent": needed,
    }


def run_one(name: str) -> dict:
    """One run in this process."""
    import short_training

    import gemma_lora as gl
    from gemma_lora.base import hardware
    from gemma_lora.data import dataset as data
    from gemma_lora.generation import evaluation

    started, settings = time.perf_counter(), RUNS[name]
    hardware.use_compilation_cache()
    dataset = gl.load_dataset(ROOT / "data/expenses")
    unseen = data.read_jsonl(ROOT / "data/expenses/validation_unseen.jsonl")
    model = gl.load_gemma()
    result = {**settings, **train(model, dataset, settings)}
    if "failed" not in result:
        splits = {"validation": dataset.validation[: VALIDATION[settings["group"]]]}
        if settings["group"] != "rate":
            splits["validation_unseen"] = unseen[: VALIDATION[settings["group"]]]
        for split, lines in splits.items():
            scores = evaluation.teacher_forced(model, lines, dataset.template, ROW_LENGTH)
            result.setdefault("scores", {})[split] = dataclasses.asdict(scores)
        if settings["method"] == "lora":
            result |= {"adapter_bytes": short_training.adapter_bytes(model), "spectra": spectra(model)}
    result["peak_memory_bytes"] = hardware.peak_memory_bytes()
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def write(path: Path, runs: dict) -> None:
    """Writes the runs that are there, in the order of `RUNS`, with the machine and the versions."""
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    settings = {"alpha": ALPHA, "row_length": ROW_LENGTH, "lines": LINES, "validation_lines": VALIDATION}
    ordered = {name: runs[name] for name in RUNS if name in runs}
    record = {"runs": ordered, "settings": settings, "machine": machine(), "versions": versions()}
    write_json_atomic(path, record)


def main() -> int:
    """Makes the runs that are missing, each in a process of its own, and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="RUN", default=list(RUNS), help="these runs only")
    parser.add_argument("--list", action="store_true", help="print the runs' names and stop")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/rank_sweep.json")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import one_process

    if chosen.list:
        print(*RUNS, sep="\n")
        return 0
    if chosen.one:
        one_process.report(run_one(chosen.one))
        return 0
    for name in chosen.only:
        runs = json.loads(chosen.output.read_text())["runs"] if chosen.output.exists() else {}
        if name in runs:
            continue
        print(name, file=sys.stderr, flush=True)
        result = one_process.measure(__file__, "--one", name, quiet=False)
        if result is None:
            return 1
        runs[name] = result
        write(chosen.output, runs)
        print(name, runs[name].get("scores", runs[name].get("failed")), f"{runs[name]['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
