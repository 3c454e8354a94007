"""What the job's settings do to its result: changed one or two at a time, on Gemma 3 270M and the expense lines.

The job's own training (LoRA on all linear layers, packed rows of 384 tokens), with one setting after the other changed,
and some in pairs. Scored teacher-forced on all of `validation` and `validation_unseen`, which is what defaults are
chosen on: the loss of the answers' tokens, and exact match, the share of answers of which every token is the most
probable one after the right tokens before it. The test splits are not used.
Each run is a process of its own and is written to the JSON when it is done; what is there is not made again.

    python benchmarks/settings.py            # what is missing: hours on two cores
    python benchmarks/settings.py --list     # the runs, and which are there
    XLA_PYTHON_CLIENT_PREALLOCATE=false python benchmarks/settings.py --jobs 6   # on a large accelerator
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
#: `lines`, `repeat` (passes over them), and what `apply_lora` and `FineTuner` take.
BASE: dict[str, Any] = {
    "lines": 1200,
    "repeat": 1,
    "lora": {"rank": 16, "targets": "all-linear"},
    "tuner": {"learning_rate": 1e-3, "rows": 1, "row_length": 384},
}


def changed(lora: dict | None = None, **others: Any) -> dict[str, Any]:
    """`BASE` with some settings changed: `lora`'s, `lines` and `repeat`, or else the tuner's."""
    own = {key: others.pop(key) for key in ("lines", "repeat") if key in others}
    return BASE | own | {"lora": BASE["lora"] | (lora or {}), "tuner": BASE["tuner"] | others}


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"rate {rate:g}": changed(learning_rate=rate) for rate in (2.5e-4, 5e-4, 1e-3, 2e-3, 3e-3, 4e-3)},
    **{f"rank {rank}": changed(lora={"rank": rank}) for rank in (4, 8, 32, 64)},
    "rank 64, rate 0.002": changed(lora={"rank": 64}, learning_rate=2e-3),
    "rank 8, rate 0.002": changed(lora={"rank": 8}, learning_rate=2e-3),
    "query and value, rate 0.002": changed(lora={"targets": ("query", "value")}, learning_rate=2e-3),
    **{f"alpha {alpha}": changed(lora={"alpha": alpha}) for alpha in (16, 64)},
    "dropout 0.05": changed(lora={"dropout": 0.05}),
    "2 rows a batch": changed(rows=2),
    "4 rows a batch": changed(rows=4),
    "rows of 192": changed(row_length=192),
    "warm-up 2 %": changed(warmup=0.02),
    "warm-up 20 %": changed(warmup=0.2),
    "filtered gradient": changed(filter_gradient=True),
    "mixed precision": changed(mixed_precision=True),
    "600 lines twice": changed(lines=600, repeat=2),
    "2400 lines": changed(lines=2400),
    "2400 lines, rate 0.002": changed(lines=2400, learning_rate=2e-3),
    "6000 lines": changed(lines=6000),
    "6000 lines, rank 64": changed(lines=6000, lora={"rank": 64}),
}


def run_one(name: str) -> dict[str, Any]:
    """One training in this process, scored."""
    import short_training

    import gemma_lora as gl
    from gemma_lora.base import hardware
    from gemma_lora.data import dataset as data
    from gemma_lora.generation import evaluation

    settings = VARIANTS[name]
    hardware.use_compilation_cache()
    dataset = gl.load_dataset(ROOT / "data/expenses")
    unseen = data.read_jsonl(ROOT / "data/expenses/validation_unseen.jsonl")
    model = gl.load_gemma()
    gl.apply_lora(model, **settings["lora"])
    tuner = gl.FineTuner(model, **settings["tuner"])
    if error := short_training.fit(tuner, dataset, settings["lines"], every=50, epochs=settings["repeat"]):
        return {**settings, "failed": error}
    scores = {
        split: dataclasses.asdict(evaluation.teacher_forced(model, lines, dataset.template))
        for split, lines in {"validation": dataset.validation, "validation_unseen": unseen}.items()
    }
    rounded = {split: {key: round(value, 4) for key, value in of.items()} for split, of in scores.items()}
    return {**settings, "steps": len(tuner.log.rows), "scores": rounded}


def main() -> int:
    """Makes the runs that are missing and writes the JSON after each."""
    import named_runs

    return named_runs.main(
        __file__, __doc__, VARIANTS, run_one, lambda result: str(result.get("failed") or result["scores"])
    )


if __name__ == "__main__":
    sys.exit(main())
