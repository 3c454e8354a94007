"""What a QLoRA step costs beside a LoRA step: seconds, and the peak memory of the whole training process.

Gemma 3 270M, rank 8 on query and value, 4 rows of 256 tokens that all carry loss, one process each, in turns, so that
a machine that slows down slows all of them. Compare times as ratios, and only where nothing else ran.

    python benchmarks/qlora_step.py                           # all: about 15 minutes on two cores
    python benchmarks/qlora_step.py --only lora nf4 --steps 3 # two of them, quickly
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
ROWS, LENGTH, RANK, TARGETS = 4, 256, 8, ("query", "value")
#: Arguments of `load_gemma` and of `FineTuner`.
SETTINGS: dict[str, tuple[dict, dict]] = {
    "lora": ({}, {}),
    "nf4": ({"quantization": "nf4", "double_quant": True}, {}),
    "lora_remat": ({}, {"remat": True}),
    "nf4_remat": ({"quantization": "nf4", "double_quant": True}, {"remat": True}),
    "lora_mixed": ({}, {"mixed_precision": True}),
    "nf4_mixed": ({"quantization": "nf4", "double_quant": True}, {"mixed_precision": True}),
    "int8": ({"quantization": "int8"}, {}),
    "gguf": ({"quantization": "gguf"}, {}),
}


def measure(name: str, steps: int) -> dict:
    """Trains some steps in this process: seconds of each but the first, and the peak."""
    import numpy as np

    import gemma_lora as gl
    from gemma_lora.base import hardware

    hardware.use_compilation_cache()
    loading, training = SETTINGS[name]
    started = time.perf_counter()
    model = gl.load_gemma(**loading)
    loaded = {"load_seconds": round(time.perf_counter() - started, 1), "load_peak": hardware.peak_memory_bytes()}
    gl.apply_lora(model, rank=RANK, targets=TARGETS)
    tuner = gl.FineTuner(model, rows=ROWS, row_length=LENGTH, chunk_size=256, **training)
    tuner.compile_for(100)
    ids = np.random.default_rng(0).integers(10, 200_000, (ROWS, LENGTH)).astype("int32")
    x, weights = {"token_ids": ids, "padding_mask": np.ones_like(ids)}, np.ones(ids.shape, "float32")
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        tuner.train_on_batch(x, np.roll(ids, -1, axis=1), weights)
        seconds.append(round(time.perf_counter() - started, 3))
    return {**loaded, "step_seconds": seconds[1:], "peak_bytes": hardware.peak_memory_bytes()}


def main() -> int:
    """Measures in two rounds, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process; one more comes before them")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each setting, in turns")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/qlora_step.json")
    parser.add_argument("--one", choices=SETTINGS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import one_process

    if chosen.one:
        one_process.report(measure(chosen.one, chosen.steps))
        return 0
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    results: dict[str, dict] = {}
    for _ in range(chosen.rounds):
        for name in chosen.only:
            run = one_process.measure(__file__, "--one", name, "--steps", str(chosen.steps))
            if run is None:
                return 1
            before = results.get(name, run | {"step_seconds": []})
            run["step_seconds"] = before["step_seconds"] + run["step_seconds"]
            run["median_step_seconds"] = round(statistics.median(run["step_seconds"]), 3)
            run["peak_bytes"] = max(before["peak_bytes"], run["peak_bytes"])
            results[name] = run
            print(f"{name:10} {run['median_step_seconds']:6.2f} s  peak {run['peak_bytes'] / 1e9:.2f} GB", flush=True)
    settings = {"rows": ROWS, "length": LENGTH, "rank": RANK, "targets": list(TARGETS), "steps": chosen.steps}
    record = {"results": results, "settings": settings, "machine": machine(), "versions": versions()}
    write_json_atomic(chosen.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
