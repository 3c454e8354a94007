"""Two versions of this project, in turns: a training step, generation, and the peak of memory.

A rewrite must not be slower. Give a checkout of the version before (`git worktree add ../before COMMIT`); both load the
same weights in the same environment, each in a process of its own, and take turns, a step or a call at a time.

    python benchmarks/versions.py --before ../before
    python benchmarks/versions.py --before ../before --only mixed generate_mixed
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import one_process

ROOT = Path(__file__).parents[1]
ROWS, LENGTH, RANK = 4, 256, 8
#: What is measured: settings of a step of 4 x 256 tokens that all carry loss, or of answers to 32 validation lines.
SETTINGS = {
    "mixed": {"mixed_precision": True, "filter_gradient": True, "chunk_size": 256},
    "float32": {"mixed_precision": False, "filter_gradient": False, "chunk_size": 256},
    "remat": {"mixed_precision": False, "filter_gradient": False, "chunk_size": 256, "remat": True},
    "nf4_mixed": {"mixed_precision": True, "filter_gradient": True, "chunk_size": 256},
    "generate": {"mixed_precision": False},
    "generate_mixed": {"mixed_precision": True},
}


def timed(call, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls after one that warms up, each in a turn of its own."""
    call()
    seconds = []
    for _ in range(repeats):
        one_process.pass_turn()
        start = time.perf_counter()
        call()
        seconds.append(round(time.perf_counter() - start, 3))
    return seconds


def measure(name: str, root: str, repeats: int) -> dict:
    """Measures one version in this process."""
    sys.path.insert(0, root)
    from gemma_lora.hardware import keep_freed_memory, peak_memory_bytes

    keep_freed_memory()  # as `gemma-lora finetune` does, before JAX is there
    import numpy as np

    import gemma_lora as gl

    if not Path(gl.__file__).is_relative_to(Path(root).resolve()):
        raise SystemExit(f"{gl.__file__} is not the version in {root}.")
    model = gl.load_gemma(**({"quantization": "nf4", "double_quant": True} if name.startswith("nf4") else {}))
    dataset = gl.load_dataset(str(ROOT / "data/expenses"))
    if name.startswith("generate"):
        gl.load_adapter(model, str(ROOT / "data/expenses/adapter"))
        prompts = [example.prompt for example in dataset.validation[:32]]
        seconds = timed(lambda: gl.generate(model, prompts, max_new_tokens=48, **SETTINGS[name]), repeats)
        return {"seconds": seconds, "peak_bytes": peak_memory_bytes()}
    gl.apply_lora(model, rank=RANK, alpha=2 * RANK, targets=("query", "value"))
    tuner = gl.FineTuner(model, rows=ROWS, row_length=LENGTH, **SETTINGS[name])
    tuner.compile_for(100)
    texts = " ".join(f"{e.prompt}\n{e.response}" for e in dataset.train[:100])
    ids = np.asarray(model.preprocessor.tokenizer.tokenize(texts), "int32")[: ROWS * LENGTH + 1]
    x = {"token_ids": ids[:-1].reshape(ROWS, LENGTH), "padding_mask": np.ones((ROWS, LENGTH), "int32")}
    y, weights = ids[1:].reshape(ROWS, LENGTH), np.ones((ROWS, LENGTH), "float32")
    seconds = timed(lambda: tuner.train_on_batch(x, y, weights), repeats)
    return {"seconds": seconds, "peak_bytes": peak_memory_bytes()}


def main() -> int:
    """Measures, prints a table, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the version to compare with")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="some of the settings")
    parser.add_argument("--repeats", type=int, default=5, help="calls that are timed, after one that is not")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/versions.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one_process.report(measure(*chosen.one, chosen.repeats))
        return 0
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    roots = {"before": chosen.before.resolve(), "after": ROOT}
    results: dict[str, dict] = {}
    for name in chosen.only:
        common = ["--before", str(chosen.before), "--repeats", str(chosen.repeats)]
        runs = [(when, ["--one", name, str(root), *common]) for when, root in roots.items()]
        found = one_process.measure_in_turns(__file__, runs)
        if len(found) < 2:
            return 1
        medians = {when: statistics.median(found[when]["seconds"]) for when in roots}
        found["ratio_seconds"] = round(medians["after"] / medians["before"], 3)
        found["ratio_peak"] = round(found["after"]["peak_bytes"] / found["before"]["peak_bytes"], 3)
        results[name] = found
        peaks = [found[when]["peak_bytes"] / 1e9 for when in roots]
        print(
            f"{name:15} {medians['before']:6.2f} s -> {medians['after']:6.2f} s ({found['ratio_seconds']:.2f})   "
            f"{peaks[0]:5.2f} GB -> {peaks[1]:5.2f} GB ({found['ratio_peak']:.2f})",
            flush=True,
        )
        write_json_atomic(chosen.output, {"results": results, "machine": machine(), "versions": versions()})
    print(f"written to {chosen.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
