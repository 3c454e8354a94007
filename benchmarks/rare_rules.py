"""Which answers are wrong, and does a training set that shows the hard rules more often mend them?

Trainings of Gemma 3 270M with the settings of `gemma-lora finetune`, on equally many lines of two kinds, with two seeds
each:

- `as built`: the first lines of data/expenses' train split;
- `half rules`: lines built in the same way and chosen so that nearly half follow one of two rules, each in its two
  cases equally often: a numeric date with the day or the month first, as a note says; a date without a year, whose
  year is that of the day it was written on or the year before. Half of the lines without a year were written on any
  day of the year that followed; of those of `as built`, half within a month.

All answer the same lines, which none was trained on: `validation`, `validation_unseen` and the last 600 of train.
Kept are these lines, the wrong answers, by prompt, and how often a training set shows each kind of line. The test
splits are not used. Each training is a process of its own and is written when it is done; what is there is not made
again.

    python benchmarks/rare_rules.py                # an hour on two cores
    python benchmarks/rare_rules.py --lines 200    # quickly, to see that it works; give --output
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
ARMS = ("as built", "half rules")
SEEDS = (0, 1)
LINES, HELD_BACK = 2200, 600
SHARES = {"no year: this year": 0.13, "no year: last year": 0.13, "day first": 0.11, "month first": 0.11, "other": 0.52}
MONTH_FIRST = ["MM/dd/yyyy"] * 3 + ["M/d/yyyy"] * 2


def kind_of(prompt: str, response: str) -> str:
    """What makes a line's date hard: the one kind, of five, that it is counted under."""
    if written := re.search(r"(?:today:?|ref\. date) (\d{4})-\d\d-\d\d", prompt):
        return "no year: this year" if written[1] == json.loads(response)["date"][:4] else "no year: last year"
    if order := re.search(r"\b(D/M|M/D)/Y", prompt):
        return {"D/M": "day first", "M/D": "month first"}[order[1]]
    return "other"


def half_rules(count: int, without: set[str]) -> list[dict[str, str]]:
    """So many lines with kinds in `SHARES`, any prefix as well; no prompt twice, and none of `without`."""
    sys.path.append(str(ROOT / "data/expenses"))
    import prepare

    class Maker(prepare.Maker):
        def __init__(self):
            super().__init__("train")
            self.noises = prepare.Deck((*prepare.TRAIN_NOISE, "missing_year"), self.rng)

        def date_forms(self, locale, kind, year):
            return super().date_forms(locale, kind, year) + (MONTH_FIRST if kind == "numeric" and year else [])

        def reference(self, day):
            if self.rng.random() < 0.5:
                return super().reference(day)
            return day + prepare.timedelta(days=self.rng.randrange(365))

    maker, kept, taken = Maker(), {}, collections.Counter()
    while len(kept) < count:
        line = maker.make()
        if line.prompt in without or len(line.prompt) > 160 or line.prompt in kept:
            continue
        kind = kind_of(line.prompt, line.record["response"])
        if taken[kind] <= SHARES[kind] * len(kept):
            taken[kind] += 1
            kept[line.prompt] = line.record
    return list(kept.values())


def scored_lines() -> list[Any]:
    """What all trainings answer, as examples."""
    import gemma_lora as gl
    from gemma_lora.data import dataset as data

    expenses = gl.load_dataset(ROOT / "data/expenses", on_notice=lambda notice: None)
    unseen = data.read_jsonl(ROOT / "data/expenses/validation_unseen.jsonl")
    return [*expenses.validation, *unseen, *expenses.train[-HELD_BACK:]]


def run_one(arm: str, seed: int, count: int) -> dict[str, Any]:
    """One training in this process, and its wrong answers."""
    import gemma_lora as gl
    from gemma_lora.base import hardware
    from gemma_lora.generation import evaluation
    from gemma_lora.job.finetuning import Settings

    hardware.use_compilation_cache()
    dataset = gl.load_dataset(ROOT / "data/expenses")
    scored = scored_lines()
    if arm == "half rules":
        lines = half_rules(count, {line.prompt for line in scored})
        dataset = gl.load_dataset(lines, template=dataset.template)
    dataset = dataclasses.replace(dataset, train=dataset.train[:count])
    settings = Settings()
    model = gl.load_gemma()
    gl.apply_lora(model, rank=settings.rank, targets=settings.targets, seed=1000 * seed)
    quick = {"mixed_precision": hardware.has_fast_bfloat16(), "filter_gradient": settings.filter_gradient}
    named = {name: getattr(settings, name) for name in ("learning_rate", "warmup", "rows", "row_length")}
    tuner = gl.FineTuner(model, seed=seed, **named, **quick)
    tuner.fit(dataset, verbose=0, validation_data=False)
    answers = gl.generate(
        model,
        [line.prompt for line in scored],
        dataset.template,
        max_new_tokens=128,
        mixed_precision=quick["mixed_precision"],
    )
    wrong = {
        line.prompt: answer
        for line, answer in zip(scored, answers, strict=True)
        if not evaluation.is_match(answer, line.response)
    }
    shown = collections.Counter(kind_of(line.prompt, line.response) for line in dataset.train)
    result = {"lines": count, "steps": len(tuner.log.rows), **quick}
    return result | {"shown": dict(sorted(shown.items())), "wrong": wrong}


def main() -> int:
    """Makes the trainings that are missing and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=LINES, help="lines of each training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/rare_rules.json")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import one_process

    if chosen.one:
        one_process.report(run_one(chosen.one[0], int(chosen.one[1]), chosen.lines))
        return 0
    lines = [{"prompt": line.prompt, "response": line.response} for line in scored_lines()]
    before = json.loads(chosen.output.read_text()) if chosen.output.exists() else {"runs": {}, "lines": lines}
    if before["lines"] != lines:
        print(f"{chosen.output}: made on other lines than data/expenses has now. Give another --output.")
        return 1
    runs = before["runs"]
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    names = {f"{arm}/{seed}": (arm, str(seed)) for seed in SEEDS for arm in ARMS}

    def keep(name: str, result: dict[str, Any]) -> None:
        runs[name] = result
        ordered = {known: runs[known] for known in names if known in runs}
        record = {"runs": ordered, "lines": lines, "machine": machine(), "versions": versions()}
        write_json_atomic(chosen.output, record)
        print(f"{name}: {len(result['wrong'])} wrong", flush=True)

    missing = [
        (name, ["--lines", str(chosen.lines), "--one", *named]) for name, named in names.items() if name not in runs
    ]
    return 0 if one_process.measure_all(__file__, missing, keep, 1) else 1


if __name__ == "__main__":
    sys.exit(main())
