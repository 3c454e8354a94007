"""The command line of a benchmark whose runs have names: it lists them, and makes and keeps those that are missing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def main(
    script: str,
    description: str | None,
    runs: Mapping[str, Any],
    run_one: Callable[[str], dict[str, Any]],
    shown: Callable[[dict[str, Any]], str],
) -> int:
    """Makes the runs that are missing, each in a process of its own, and writes the JSON after each.

    Args:
        script: The calling script's `__file__`; its results go to `results/NAME.json` beside it.
        description: The script's own text, for `--help`.
        runs: What may be run, by name; the JSON keeps this order.
        run_one: Makes one run in this process, given its name.
        shown: What to print of a result.

    Returns:
        The script's exit status: 1 if a run failed.
    """
    results = Path(script).resolve().parent / "results" / f"{Path(script).stem}.json"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument("--only", nargs="+", choices=runs, default=list(runs), metavar="RUN", help="these runs alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one for a large accelerator")
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--one", choices=runs, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import one_process

    if chosen.one:
        one_process.report(run_one(chosen.one))
        return 0
    made = json.loads(chosen.output.read_text())["runs"] if chosen.output.exists() else {}
    if chosen.list:
        for name in chosen.only:
            print(name, "(done)" if name in made else "")
        return 0
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    def keep(name: str, result: dict[str, Any]) -> None:
        made[name] = result
        ordered = {known: made[known] for known in runs if known in made}
        write_json_atomic(chosen.output, {"runs": ordered, "machine": machine(), "versions": versions()})
        print(name, shown(result), flush=True)

    missing = [(name, ["--one", name]) for name in chosen.only if name not in made]
    return 0 if one_process.measure_all(script, missing, keep, chosen.jobs) else 1
