"""Sixteen ways to fine-tune Gemma 3 270M on the expense lines, compared.

Every method sees the same lines in the same order, in packed rows of 384 tokens. Kinds of runs:

  rate/<method>/<rate>   short; the rate with the least loss on lines of `validation` and `validation_unseen` is chosen
  final/<method>/<seed>  longer, at that rate; scored on lines of `validation` on the way, which shows how many lines a
                         method needs, and once, at the end, on all of `test` and `test_unseen`
  same/nf4_dq/<seed>     the same at the rate of LoRA on float32, which tells NF4's own part from the rate's
  mixed/lora_all/<seed>  a final run again, in mixed precision

Float32 on an accelerator. On a CPU that multiplies bfloat16 quickly, long runs are in mixed precision and with the
gradient filter, as in `gemma-lora finetune`, except where the kernels themselves are trained or Keras's own layers
compute; a run says which in `mixed_precision`, and `mixed/lora_all` what it changes.

Scored are the loss of the answers' tokens, teacher-forced exact match (the share of answers of which every token is the
most probable one after the right tokens before it: what greedy generation would write to the letter), and the
perplexity of English text, which shows forgetting. Five methods have three seeds, the others one.
Each run is a process of its own and is written to the JSON when it is done; what is there is not made again, so stop it
and start it as you like. The scores do not depend on what else the machine does. Time and memory do; they are measured
apart, by `--time`, on the machine they are said for.

    python benchmarks/methods.py                            # what is missing: many hours on two cores
    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/methods.py --jobs 9   # on a large accelerator
    python benchmarks/methods.py --methods lora_all nf4_dq  # these two, all their runs
    python benchmarks/methods.py --list                     # the runs in their order, and which are there
    python benchmarks/methods.py --time                     # seconds a step, on a quiet machine
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
ROW_LENGTH = 384
#: Training lines of a run, and how many lines of each validation split it is scored on.
LINES = {"rate": 400, "final": 2400, "time": 24}
VALIDATION = {"rate": 100, "final": 150}
#: After so many lines a final run is scored on `validation`.
ON_THE_WAY = (300, 600, 1200, 1800)
SEEDS = (0, 1, 2)

LORA, SMALL, LARGE = (2.5e-4, 5e-4, 1e-3, 2e-3), (5e-4, 1e-3, 2e-3, 4e-3), (6e-5, 1.25e-4, 2.5e-4, 5e-4)
ALL: dict[str, Any] = {"rank": 16, "targets": "all-linear"}
#: What loads the model, what is put on it, and the rates that are tried. In the order in which the runs are made.
METHODS: dict[str, dict[str, Any]] = {
    "lora_all": {"lora": ALL, "rates": LORA},
    "nf4_dq": {"lora": ALL, "quantization": "nf4", "double_quant": True, "rates": LORA},
    "lora_qv_8": {"lora": {"rank": 8, "targets": ("query", "value")}, "rates": SMALL},
    "full": {"rates": (1.5e-5, 3e-5, 6e-5, 1.2e-4)},
    "dora_all": {"lora": {**ALL, "dora": True}, "rates": LORA},
    "int8": {"lora": ALL, "quantization": "int8", "rates": LORA},
    "int8_keras": {"keras": {"rank": 16}, "quantization": "keras", "rates": LORA},
    "gguf": {"lora": ALL, "quantization": "gguf", "rates": LORA},
    "int4": {"lora": ALL, "quantization": "int4", "rates": LORA},
    "rslora_all": {"lora": {**ALL, "rslora": True}, "rates": LARGE},
    "houlsby": {"adapters": {"bottleneck": 80}, "rates": (5e-4, 1e-3, 3e-3, 1e-2)},
    "lora_qv_1": {"lora": {"rank": 1, "targets": ("query", "value")}, "rates": SMALL},
    "lora_qv_4": {"lora": {"rank": 4, "targets": ("query", "value")}, "rates": SMALL},
    "lora_qv_16": {"lora": {"rank": 16, "targets": ("query", "value")}, "rates": SMALL},
    "lora_qv_64": {"lora": {"rank": 64, "targets": ("query", "value")}, "rates": SMALL},
    "nf4": {"lora": ALL, "quantization": "nf4", "rates": LORA},
}
#: Those that matter most have three seeds.
REPEATED = ("lora_all", "nf4_dq", "lora_qv_8", "full", "dora_all")


def planned() -> list[tuple[str, str, float | int]]:
    """The runs as `(kind, method, rate or seed)`, in their order: every method once, then the further seeds."""
    once = []
    for method, settings in METHODS.items():
        once += [("rate", method, rate) for rate in settings["rates"]] + [("final", method, SEEDS[0])]
    more = [("final", method, seed) for seed in SEEDS[1:] for method in REPEATED]
    return once + [("same", "nf4_dq", SEEDS[0]), ("mixed", "lora_all", SEEDS[0])] + more


def name_of(kind: str, method: str, value: float | int) -> str:
    return f"{kind}/{method}/{value:g}"


def best_rate(runs: dict[str, dict], method: str) -> float | None:
    """The rate whose short run has the least validation loss; None until all are there, or where all failed."""
    short = [runs.get(name_of("rate", method, rate)) for rate in METHODS[method]["rates"]]
    fine = [run for run in short if run is not None and "failed" not in run]
    if None in short or not fine:
        return None
    return min(fine, key=lambda run: run["validation_loss"])["rate"]


def is_mixed(kind: str, method: str) -> bool:
    """Whether this machine makes this run in mixed precision. Time is measured in float32."""
    import jax

    from gemma_lora.base import hardware

    possible = method not in ("full", "int8_keras")  # trained kernels, and layers that are not ours, stay float32
    gains = jax.default_backend() == "cpu" and hardware.has_fast_bfloat16()
    return kind == "mixed" or (kind in ("final", "same") and possible and gains)


def prepared(method: str, seed: int):
    """The model with what the method trains, everything else frozen."""
    import gemma_lora as gl
    from gemma_lora.lora import houlsby as adapters

    settings = METHODS[method]
    quantization = settings.get("quantization")
    if quantization in (None, "keras"):
        model = gl.load_gemma()
    else:
        model = gl.load_gemma(quantization=quantization, double_quant=settings.get("double_quant", False))
    if "lora" in settings:
        gl.apply_lora(model, seed=1000 * seed, **settings["lora"])
    elif "adapters" in settings:
        adapters.apply_adapters(model, seed=1000 * seed, **settings["adapters"])
    elif "keras" in settings:
        keras_int8_lora(model, settings["keras"]["rank"], seed)
    return model


def keras_int8_lora(model, rank: int, seed: int) -> None:
    """Keras's own way on the linear layers: `quantize("int8")`, then `enable_lora`; what gets wrong gradients."""
    import keras

    from gemma_lora import lora

    keras.utils.set_random_seed(seed)
    layers = [layer for _, _, layer in lora.linear_layers(model)]
    for variable in model.variables:
        variable.trainable = False
    for layer in layers:
        layer.quantize("int8")
        layer.enable_lora(rank)


def trained(
    model, dataset, rate: float, seed: int, limit: int, on_the_way: tuple[int, ...] = (), mixed: bool = False
) -> dict[str, Any]:
    """Fine-tunes a prepared model in place, and says what it cost and how it did after so many lines."""
    import keras
    import short_training

    import gemma_lora as gl
    from gemma_lora.generation import evaluation

    tuner = gl.FineTuner(model, learning_rate=rate, row_length=ROW_LENGTH, seed=seed, mixed_precision=mixed)
    progress: dict[str, float] = {}

    class OnTheWay(keras.callbacks.Callback):
        """Scores after shares of the steps: rows hold about equally many lines, so those are shares of the lines."""

        def on_train_batch_end(self, batch, logs=None):
            for lines in on_the_way:
                if batch + 1 == round(lines / limit * self.params["steps"]):
                    tuner.jax_state_sync()  # Keras keeps the values apart while it trains
                    some = dataset.validation[: VALIDATION["final"]]
                    scores = evaluation.teacher_forced(model, some, dataset.template, ROW_LENGTH)
                    progress[str(lines)] = round(scores.exact_match, 4)

    if error := short_training.fit(tuner, dataset, limit, every=20, callbacks=[OnTheWay()]):
        return {"failed": error}
    return {
        "validation_on_the_way": progress,
        "trained_parameters": short_training.trained_parameters(model),
        "weight_bytes": sum(v.value.nbytes for v in model.variables if "seed_generator" not in v.path),
        "losses": twentieths([row["loss"] for row in tuner.log.rows]),
        "seconds_of_steps": [round(row["seconds"], 3) for row in tuner.log.rows],
    }


def twentieths(losses: list[float]) -> list[float]:
    """The mean of each twentieth of the steps' losses (of each step, where there are fewer)."""
    import numpy as np

    return [round(float(part.mean()), 4) for part in np.array_split(losses, min(20, len(losses)))]


def run_one(kind: str, method: str, value: float, rate: float) -> dict[str, Any]:
    """One run in this process."""
    import short_training

    import gemma_lora as gl
    from gemma_lora.base import hardware
    from gemma_lora.data import dataset as data
    from gemma_lora.generation import evaluation

    hardware.use_compilation_cache()
    seed = SEEDS[0] if kind == "rate" else int(value)
    model = prepared(method, seed)
    long = kind in ("final", "same", "mixed")
    dataset = gl.load_dataset(ROOT / "data/expenses")
    result = {"method": method, "rate": rate, "seed": seed, "lines": LINES["final" if long else kind]}
    mixed = is_mixed(kind, method)
    result |= {"device": hardware.machine()["devices"], "mixed_precision": mixed}
    result |= trained(model, dataset, rate, seed, result["lines"], ON_THE_WAY if long else (), mixed)
    if "failed" in result:
        return result
    if kind == "time":
        result["median_step_seconds"] = round(statistics.median(result.pop("seconds_of_steps")[1:]), 3)
        return result | {"peak_memory_bytes": hardware.peak_memory_bytes()}
    del result["seconds_of_steps"]
    splits = {
        "validation": dataset.validation,
        "validation_unseen": data.read_jsonl(ROOT / "data/expenses/validation_unseen.jsonl"),
    }
    splits = {name: lines[: VALIDATION["final" if long else kind]] for name, lines in splits.items()}
    if long:
        splits |= {name: dataset.tests[name] for name in ("test", "test_unseen")}
        result["adapter_bytes"] = short_training.adapter_bytes(model)
        result["english_perplexity"] = round(evaluation.perplexity(model, evaluation.english_text()), 2)
    result["scores"] = {}
    for split, examples in splits.items():
        scores = evaluation.teacher_forced(model, examples, dataset.template, ROW_LENGTH)
        result["scores"][split] = {k: round(v, 4) for k, v in dataclasses.asdict(scores).items()}
    both = [result["scores"][split]["loss"] for split in ("validation", "validation_unseen")]
    result["validation_loss"] = round(sum(both) / 2, 4)
    return result


def write(path: Path, runs: dict[str, dict]) -> None:
    """Writes the runs that are there, in the order of the plan, with the machine and the versions of the last."""
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    order = [name_of(*run) for run in planned()] + [f"time/{method}/0" for method in METHODS]
    settings = {"row_length": ROW_LENGTH, "lines": LINES, "validation_lines": VALIDATION, "on_the_way": ON_THE_WAY}
    record = {
        "runs": {name: runs[name] for name in order if name in runs},
        "methods": METHODS,
        "settings": settings,
        "machine": machine(),
        "versions": versions(),
    }
    write_json_atomic(path, record)


def main() -> int:
    """Makes the runs that are missing, each in a process of its own, and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=list(METHODS))
    parser.add_argument("--most", type=int, help="stop after so many runs")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument("--time", action="store_true", help="only measure seconds a step, anew")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one for a large accelerator")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/methods.json")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import one_process

    if chosen.one:
        kind, method, value, rate = chosen.one
        one_process.report(run_one(kind, method, float(value), float(rate)))
        return 0
    runs = json.loads(chosen.output.read_text())["runs"] if chosen.output.exists() else {}
    wanted = [run for run in planned() if run[1] in chosen.methods]
    if chosen.list:
        for run in wanted:
            print(name_of(*run), "(done)" if name_of(*run) in runs else "")
        return 0
    wanted = [run for run in wanted if name_of(*run) not in runs][: chosen.most]
    if chosen.time:
        wanted = [("time", method, 0) for method in chosen.methods]
    if chosen.jobs > 1:
        wanted.sort(key=lambda run: run[0] != "rate")  # what is alike, and does not wait for the others, together

    def keep(name: str, result: dict[str, Any]) -> None:
        runs[name] = result
        write(chosen.output, runs)
        shown = ("failed", "validation_loss", "scores", "median_step_seconds", "peak_memory_bytes")
        print(name, {key: result[key] for key in shown if key in result}, flush=True)

    complete = True
    for _, group in itertools.groupby(
        wanted, key=lambda run: run[0] == "rate"
    ):  # rates are there before their long run
        arguments = []
        for kind, method, value in group:
            rate = value if kind == "rate" else best_rate(runs, "lora_all" if kind == "same" else method)
            if rate is None and kind != "time":
                print(f"{name_of(kind, method, value)}: not every rate of it was tried, or none gave a number")
                complete = False
                continue
            rate = rate or METHODS[method]["rates"][1]  # a step takes as long at any rate
            arguments += [(name_of(kind, method, value), ["--one", kind, method, f"{value:g}", f"{rate:g}"])]
        quiet = chosen.jobs > 1
        complete = one_process.measure_all(__file__, arguments, keep, chosen.jobs, quiet) and complete
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
