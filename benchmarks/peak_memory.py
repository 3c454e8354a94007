"""Peak memory of whole training processes on Gemma 3 270M, beside what `gemma_lora.memory` computes.

One process a setting, two steps each on rows full of tokens that all carry loss. Peaks do not depend on what else the
machine does, so this may run beside other work.

    python benchmarks/peak_memory.py                         # all settings: about 12 minutes on two cores
    python benchmarks/peak_memory.py --settings lora remat   # some of them; the others stay in the JSON
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
QV = ["query", "value"]
#: Arguments of `memory.plan`, which `load_gemma`, `apply_lora` and `FineTuner` take in the same words.
SETTINGS: dict[str, dict] = {
    "lora": {"rank": 8, "targets": QV, "rows": 4, "row_length": 256},
    "remat": {"rank": 8, "targets": QV, "rows": 4, "row_length": 256, "remat": True},
    "mixed": {"rank": 8, "targets": QV, "rows": 4, "row_length": 256, "mixed_precision": True},
    "all-linear": {"rank": 16, "targets": "all-linear", "rows": 1, "row_length": 384},
    "finetune": {"rank": 16, "targets": "all-linear", "rows": 1, "row_length": 384, "mixed_precision": True},
    "short": {"rank": 16, "targets": "all-linear", "rows": 1, "row_length": 64},
    "wide": {"rank": 8, "targets": QV, "rows": 8, "row_length": 256},
    "long": {"rank": 8, "targets": QV, "rows": 1, "row_length": 1024},
    "nf4": {"method": "qlora", "rank": 8, "targets": QV, "rows": 4, "row_length": 256},
    "nf4 remat": {"method": "qlora", "rank": 8, "targets": QV, "rows": 4, "row_length": 256, "remat": True},
    "nf4 finetune": {"method": "qlora", "rank": 16, "targets": "all-linear", "rows": 1, "row_length": 384},
    "int8": {"method": "qlora", "quantization": "int8", "rank": 8, "targets": QV, "rows": 4, "row_length": 256},
}


def measure(setting: dict) -> dict:
    """Trains two steps in this process and gives its peak."""
    import numpy as np

    import gemma_lora as gl
    from gemma_lora.base import hardware

    named = dict(setting)
    quantization = named.pop("quantization", "nf4") if named.pop("method", "lora") == "qlora" else None
    model = gl.load_gemma(quantization=quantization, double_quant=quantization == "nf4")
    gl.apply_lora(model, rank=named.pop("rank"), targets=named.pop("targets"))
    tuner = gl.FineTuner(model, chunk_size=256, **named)
    tuner.compile_for(100)
    shape = (setting["rows"], setting["row_length"])
    ids = np.random.default_rng(0).integers(10, 200_000, shape).astype("int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    for _ in range(2):
        tuner.train_on_batch(x, np.roll(ids, -1, axis=1), np.ones(shape, "float32"))
    return {"peak_bytes": hardware.peak_memory_bytes()}


def main() -> int:
    """Measures, prints a table and writes the JSON after each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/peak_memory.json")
    parser.add_argument("--one", choices=SETTINGS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import one_process

    if chosen.one:
        one_process.report(measure(SETTINGS[chosen.one]))
        return 0
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.gemma import memory
    from gemma_lora.job.finetuning import versions

    record = json.loads(chosen.output.read_text()) if chosen.output.is_file() else {"results": {}}
    for name in chosen.settings:
        peak = one_process.measure(__file__, "--one", name)
        if peak is None:
            return 1
        plan = memory.plan(memory.CONFIGURATIONS["gemma3_270m"], **SETTINGS[name])
        result = peak | {"setting": SETTINGS[name]}
        record["results"][name] = result
        record |= {"machine": machine(), "versions": versions()}
        write_json_atomic(chosen.output, record)
        ratio = plan.total / result["peak_bytes"]
        print(f"{name:12} measured {result['peak_bytes'] / 1e9:5.2f} GB, computed / measured {ratio:.3f}", flush=True)
    print(f"written to {chosen.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
