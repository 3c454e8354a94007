"""Houlsby's adapters beside LoRA on Gemma 3 270M, with equally many trained numbers, on the expense lines.

Every run sees the same training lines in the same order, one row of 256 packed tokens a step, in float32. A method's
peak rate is chosen by the loss on the first validation lines; a run that is its method's best so far is scored on more
lines, of the validation split and of the one with unseen merchants. The test splits are not used. Scored are the mean
loss of a response's tokens and, teacher-forced, exact match: the share of lines whose every response token is the
likeliest one after the right prefix.

    python benchmarks/adapters.py                                    # all runs: about 25 minutes on two cores
    python benchmarks/adapters.py --methods adapters --rates 0.003   # one run
    python benchmarks/adapters.py --lines 20 --output trial.json     # a short trial

The JSON is written after every run, and a run that stands in it is not repeated: start again after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
ROW_LENGTH, SEED = 256, 0
CHOOSING, SCORED = 40, 60  # validation lines: to choose a rate by, and to score
#: Peak rates that are tried: the best of each method lies between two others.
RATES = {"adapters": (1e-3, 3e-3, 1e-2), "lora": (3e-4, 1e-3, 3e-3)}
#: 711,936 to 737,280 trained numbers each.
METHODS: dict[str, dict[str, Any]] = {
    "adapters": {"bottleneck": 15},
    "lora_query_value": {"rank": 16, "targets": ("query", "value")},
    "lora_all_linear": {"rank": 3, "targets": "all-linear"},
}


def attach(model, method: str) -> None:
    """Gives the model what the method trains, in place of anything it has."""
    from gemma_lora import lora
    from gemma_lora.lora import houlsby as adapters

    lora.detach_lora(model)
    adapters.remove_adapters(model)
    settings = METHODS[method]
    apply = adapters.apply_adapters if "bottleneck" in settings else lora.apply_lora
    apply(model, **settings, seed=SEED)


def scores(model, examples, template) -> dict[str, float]:
    """Loss and teacher-forced exact match of a model on some lines."""
    from gemma_lora.generation import evaluation

    return dataclasses.asdict(evaluation.teacher_forced(model, examples, template, ROW_LENGTH))


def run(model, dataset, method: str, rate: float, lines: int, best: float) -> dict[str, Any]:
    """Trains one method at one rate; scores it on more lines if its loss is below `best`, the method's so far."""
    import jax
    import keras

    import gemma_lora as gl
    from gemma_lora.data import dataset as data

    attach(model, method)
    tuner = gl.FineTuner(model, learning_rate=rate, rows=1, row_length=ROW_LENGTH, seed=SEED)
    clock: list[float] = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda step, logs: clock.append(time.process_time()))
    tuner.fit(dataset, limit=lines, verbose=0, validation_data=False, callbacks=[watch])
    seconds = [row["seconds"] for row in tuner.log.rows][1:]  # the first step compiles
    result = {
        "method": method,
        "rate": rate,
        "trained": sum(int(v.value.size) for v in model.trainable_variables),
        "steps": len(tuner.log.rows),
        "median_step_seconds": round(statistics.median(seconds), 3),
        # of all threads together: it hardly changes when other programs share the processor
        "median_step_cpu_seconds": round(statistics.median(b - a for a, b in itertools.pairwise(clock)), 3),
        "training_loss": [round(row["loss"], 4) for row in tuner.log.rows],
        "choosing": scores(model, dataset.validation[:CHOOSING], dataset.template),
    }
    if result["choosing"]["loss"] < best:
        unseen = data.read_jsonl(ROOT / "data/expenses/validation_unseen.jsonl")
        for split, examples in {"validation": dataset.validation, "validation_unseen": unseen}.items():
            result[split] = scores(model, examples[:SCORED], dataset.template)
    del tuner
    jax.clear_caches()
    gc.collect()
    return result


def main() -> int:
    """Trains what is missing in the JSON and prints each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, help="peak learning rates; by default the method's three")
    parser.add_argument("--lines", type=int, default=80, help="training lines; 80 make about 27 steps")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/adapters.json")
    chosen = parser.parse_args()
    import gemma_lora as gl
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    settings = {"lines": chosen.lines, "row_length": ROW_LENGTH, "rows": 1, "seed": SEED, "precision": "float32"}
    record = {"runs": [], "settings": settings, "methods": METHODS, "machine": machine(), "versions": versions()}
    if chosen.output.is_file():
        record["runs"] = json.loads(chosen.output.read_text(encoding="utf-8"))["runs"]
    model = None
    for method, rate in [(m, rate) for m in chosen.methods for rate in chosen.rates or RATES[m.split("_")[0]]]:
        losses = {r["rate"]: r["choosing"]["loss"] for r in record["runs"] if r["method"] == method}
        if rate in losses:
            continue
        model = model or gl.load_gemma()
        dataset = gl.load_dataset(ROOT / "data/expenses")
        result = run(model, dataset, method, rate, chosen.lines, min(losses.values(), default=float("inf")))
        record["runs"].append(result)
        write_json_atomic(chosen.output, record)
        shown = {name: result.get(name) for name in ("choosing", "validation", "validation_unseen")}
        print(f"{method} at {rate:g}: {result['trained']:,} trained, {result['steps']} steps, {shown}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
