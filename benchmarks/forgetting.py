"""What keeps a model from forgetting while it learns a small task: the job's training, changed one thing at a time.

The two small tasks of `data/`, trained with the job's defaults, and with changes. Each run gives the perplexity on
English text that has nothing to do with the task, the loss on the validation lines, and the score on the test lines.
Each run is a process of its own and is written to the JSON when it is done; what is there is not made again.

    python benchmarks/forgetting.py                            # what is missing: about 4 minutes per run on two cores
    python benchmarks/forgetting.py --list
    python benchmarks/forgetting.py --only "queues, replay 0.1, seed 0"
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
TASKS = ("queues", "garden_chat")
SEEDS = (0, 1, 2)
#: What differs from a training without replay at the default rate.
METHODS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "replay 0.1": {"replay_share": 0.1},
    "replay 0.2": {"replay_share": 0.2},
    "rate 0.0002": {"learning_rate": 2e-4},
    "replay 0.1, rate 0.0002": {"replay_share": 0.1, "learning_rate": 2e-4},
}
RUNS = {
    f"{task}, {method}, seed {seed}": (task, method, seed) for seed in SEEDS for task in TASKS for method in METHODS
}


def run_one(name: str) -> dict[str, Any]:
    """One training in this process, scored."""
    import gemma_lora as gl
    from gemma_lora.base import hardware
    from gemma_lora.training.epochs import default_epochs

    task, method, seed = RUNS[name]
    changes = dict(METHODS[method])
    share = changes.pop("replay_share", 0.0)
    hardware.use_compilation_cache()
    dataset = gl.load_dataset(ROOT / "data" / task, on_notice=lambda notice: None)
    model = gl.load_gemma()
    english = gl.evaluation.english_text()
    before = gl.perplexity(model, english)
    texts = gl.base_text(model) if share else None
    gl.apply_lora(model, seed=seed)
    tuner = gl.FineTuner(model, seed=seed, **changes)
    epochs = default_epochs(len(dataset.train))
    history = tuner.fit(dataset, epochs=epochs, verbose=0, replay=texts, replay_share=share).history
    scores = gl.evaluate(model, dataset.tests["test"])
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "steps": len(tuner.log.rows),
        "english": {"before": round(before, 1), "after": round(gl.perplexity(model, english), 1)},
        "validation_loss": [round(loss, 4) for loss in history["val_loss"]],
        "test": {"exact_match": round(scores.exact_match, 3), "count": scores.count},
    }


def main() -> int:
    """Makes the runs that are missing and writes the JSON after each."""
    import named_runs

    return named_runs.main(__file__, __doc__, RUNS, run_one, lambda result: f"{result['english']} {result['test']}")


if __name__ == "__main__":
    sys.exit(main())
