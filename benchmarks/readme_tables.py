"""Writes the tables of measurements in the pages anew from benchmarks/results/*.json.

A table stands between `<!-- table NAME -->` and `<!-- end -->`, so that pages and results cannot drift apart:
tests/test_readme.py fails where they have.

    python benchmarks/readme_tables.py           # write them
    python benchmarks/readme_tables.py --check   # only say which are out of date; status 1 if one is
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
_TABLE = re.compile(r"(<!-- table (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

PEERS = {
    "ours_mixed": "this project, mixed precision",
    "keras_hub": "KerasHub's `enable_lora` and `fit`, float32",
    "peft_bf16": "Hugging Face PEFT, bfloat16",
    "ours": "this project, float32",
    "keras_hub_mixed": "KerasHub's `enable_lora` and `fit`, `mixed_bfloat16`",
    "peft_fp32": "Hugging Face PEFT, float32",
    "ours_filtered": "this project, float32, gradient filter",
    "ours_remat": "this project, float32, remat",
}
GENERATION = {
    "ours": "this project, float32",
    "ours_mixed": "this project, mixed precision",
    "keras_hub": "KerasHub's `generate`, float32",
    "transformers_fp32": "Hugging Face transformers, float32",
    "transformers_bf16": "Hugging Face transformers, bfloat16",
}
BASES = {
    "lora": "LoRA, float32",
    "lora_remat": "LoRA, float32, remat",
    "lora_mixed": "LoRA, mixed precision",
    "nf4": "NF4, double quantization",
    "nf4_remat": "NF4, double quantization, remat",
    "nf4_mixed": "NF4, double quantization, mixed precision",
    "int8": "int8",
    "gguf": "the file's own GGUF blocks",
}
METHODS = {
    "full": "full fine-tuning",
    "lora_qv_1": "LoRA, query and value, rank 1",
    "lora_qv_4": "LoRA, query and value, rank 4",
    "lora_qv_8": "LoRA, query and value, rank 8",
    "lora_qv_16": "LoRA, query and value, rank 16",
    "lora_qv_64": "LoRA, query and value, rank 64",
    "lora_all": "LoRA, all linear, rank 16",
    "rslora_all": "rsLoRA, all linear, rank 16",
    "dora_all": "DoRA, all linear, rank 16",
    "houlsby": "Houlsby adapters",
    "int8_keras": "Keras's int8 and `enable_lora`",
    "int8": "int8 base, LoRA",
    "int4": "int4 base, LoRA",
    "nf4": "NF4 base, LoRA",
    "nf4_dq": "NF4 base, double quantization, LoRA",
    "gguf": "GGUF blocks as base, LoRA",
}


TESTS = ("test", "test_unseen")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB"


def finetune(record: dict[str, Any]) -> str:
    """What one `make finetune` changed.

    finetune.json holds the run's metrics.json and settings.json under "metrics" and "settings", and what `time` gave.
    """
    before, after = record["metrics"]["before"], record["metrics"]["after"]
    rows = []
    for split in (*TESTS, "test_new_locales"):
        start = f"{100 * before[split]['exact_match']:.0f} %" if split in before else "–"
        rows.append([f"`{split}`", str(after[split]["count"]), start, f"{100 * after[split]['exact_match']:.1f} %"])
    english = [f"{record['metrics']['english_perplexity'][when]:.1f}" for when in ("before", "after")]
    return table(["split", "lines", "before", "after"], [*rows, ["perplexity on English text", "", *english]])


def lora_step(record: dict[str, Any]) -> str:
    rows = []
    for peer, name in PEERS.items():
        if (run := record["results"].get(peer)) is not None:
            rate = f"{run['loss_tokens_per_second']:.0f}"
            rows.append(
                [name, str(run["group"]), f"{run['median_step_seconds']:.1f}", _gigabytes(run["peak_bytes"]), rate]
            )
    return table(["", "group", "s a step", "peak memory", "loss-carrying tokens a second"], rows)


def qlora_step(record: dict[str, Any]) -> str:
    results = record["results"]
    rows = []
    for setting, name in BASES.items():
        if (run := results.get(setting)) is not None:
            ratio = run["median_step_seconds"] / results["lora"]["median_step_seconds"]
            rows.append([name, f"{run['median_step_seconds']:.1f}", f"{ratio:.2f}", _gigabytes(run["peak_bytes"])])
    return table(["frozen weights", "s a step", "times LoRA's", "peak memory"], rows)


def generation_speed(record: dict[str, Any]) -> str:
    rows = []
    for peer, name in GENERATION.items():
        if (run := record["results"].get(peer)) is not None:
            row = [name, f"{run['median_seconds']:.0f}", f"{run['new_tokens_per_second']:.0f}"]
            rows.append([*row, _gigabytes(run["peak_bytes"]), str(run["answers_alike"])])
    lines = record["settings"]["lines"]
    head = ["", f"s for {lines} answers", "new tokens a second", "peak memory", "answers as in the first row"]
    return table(head, rows)


def methods(record: dict[str, Any]) -> str:
    runs = record["runs"]
    rows = []
    for method, name in METHODS.items():
        of: dict[str, list] = {kind: [] for kind in ("rate", "final", "time", "same", "mixed")}
        for key, run in runs.items():
            kind, whose, _ = key.split("/")
            if whose == method and "failed" not in run:
                of[kind].append(run)
        if not of["rate"]:
            continue
        chosen = min(of["rate"], key=lambda run: run["validation_loss"])
        short = [chosen["scores"][split]["exact_match"] for split in ("validation", "validation_unseen")]
        row = [name, f"{chosen['trained_parameters'] / 1e6:.2f} M", f"{chosen['rate']:g}"]
        row += [f"{chosen['validation_loss']:.3f}", f"{100 * statistics.mean(short):.0f}", *_long(of["final"])]
        if timed := of["time"]:
            row += [_gigabytes(timed[0]["peak_memory_bytes"]), f"{timed[0]['median_step_seconds']:.1f}"]
        else:
            row += ["–"] * 2
        rows.append(row)
        for kind, difference in {"same": "at LoRA's rate", "mixed": "in mixed precision"}.items():
            if again := of[kind]:
                begin = [f"{name}, {difference}", row[1], f"{again[0]['rate']:g}"]
                rows.append([*begin, "–", "–", *_long(again), "–", "–"])
    lines = record["settings"]["lines"]
    short, long = f"{lines['rate']} lines: loss", f"{lines['final']:,} lines: `test` %"
    costs = ["English perplexity", "peak memory", "s a step"]
    return table(["method", "trained", "rate", short, "%", long, "`test_unseen` %", "lines to 90 %", *costs], rows)


def _long(runs: list[dict[str, Any]]) -> list[str]:
    """The columns of long runs of one method."""
    if not runs:
        return ["–"] * 4
    shares = [_spread([100 * run["scores"][split]["exact_match"] for run in runs]) for split in TESTS]
    return [*shares, _lines_to_90(runs), f"{statistics.mean(run['english_perplexity'] for run in runs):.0f}"]


def _lines_to_90(runs: list[dict[str, Any]]) -> str:
    """After how many lines 90 % of the validation lines were right for the first time, in the mean of the seeds."""
    seen: dict[int, list[float]] = {}
    for run in runs:
        end = {str(run["lines"]): run["scores"]["validation"]["exact_match"]}
        for lines, share in (run["validation_on_the_way"] | end).items():
            seen.setdefault(int(lines), []).append(share)
    enough = [lines for lines, shares in sorted(seen.items()) if statistics.mean(shares) > 0.9 - 1e-9]
    return f"{enough[0]:,}" if enough else f"> {max(seen):,}"


def _spread(values: list[float]) -> str:
    """The mean, and the least and the most where there are several."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}–{max(values):.1f})"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "finetune": finetune,
    "lora_step": lora_step,
    "qlora_step": qlora_step,
    "generation_speed": generation_speed,
    "methods": methods,
}


#: The pages that hold tables.
PAGES = ("README.md", "docs/results.md")


def filled(text: str) -> str:
    """A page with every table written from its results."""

    def written(match: re.Match) -> str:
        record = json.loads((RESULTS / f"{match[2]}.json").read_text(encoding="utf-8"))
        return match[1] + TABLES[match[2]](record) + match[4]

    return _TABLE.sub(written, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, status 1 if a table is out of date")
    chosen = parser.parse_args()
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        old = {m[2]: m[3] for m in _TABLE.finditer(text)}
        stale += [f"{m[2]} in {page}" for m in _TABLE.finditer(new) if old[m[2]] != m[3]]
        if not chosen.check:
            path.write_text(new, encoding="utf-8")
    if chosen.check:
        print(f"out of date: {', '.join(stale)}" if stale else "all tables are up to date")
        return bool(stale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
