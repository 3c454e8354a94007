"""A measurement in a process of its own: its peak of memory is its own, and nothing is left from the one before.

A machine drifts, by half its speed within minutes. So what is compared runs in turns, piece by piece: see
`measure_in_turns`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_MARK = "RESULT "
_TURN = "TURN"
_IN_TURNS = "GEMMA_LORA_BENCHMARK_IN_TURNS"


def report(result: dict[str, Any]) -> None:
    """Prints what `measure` in the parent process reads."""
    print(_MARK + json.dumps(result))


def measure(script: str, *arguments: str, quiet: bool = True) -> dict[str, Any] | None:
    """Runs `python script arguments…` and gives what it reported.

    Args:
        script: The calling script's `__file__`.
        *arguments: What makes it measure one thing and call `report`.
        quiet: Whether the process's error stream is held back and shown only if it fails.

    Returns:
        The reported dictionary; None, with the reason on the error stream, if there is none.
    """
    name = " ".join(arguments)
    return measure_in_turns(script, [(name, list(arguments))], quiet).get(name)


def pass_turn() -> None:
    """In a process of `measure_in_turns`: lets the others work, and comes back when it is this one's turn again."""
    if _IN_TURNS in os.environ:
        print(_TURN, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("The process that gives the turns has ended.")


def measure_in_turns(
    script: str, runs: Iterable[tuple[str, list[str]]], quiet: bool = True
) -> dict[str, dict[str, Any]]:
    """Processes that are there at the same time, of which one works: each until it calls `pass_turn` or has ended.

    Args:
        script: The calling script's `__file__`.
        runs: `(name, arguments)` of each; see `measure`. All must fit in memory together.
        quiet: See `measure`.

    Returns:
        The results by name. One that failed is missing, and its reason is on the error stream.
    """
    waiting: list[tuple[str, subprocess.Popen, Any]] = []
    started: list[subprocess.Popen] = []
    results: dict[str, dict[str, Any]] = {}
    try:
        for name, arguments in runs:
            errors = tempfile.TemporaryFile("w+") if quiet else None
            command = [sys.executable, script, *arguments]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
            process = subprocess.Popen(command, env=os.environ | {_IN_TURNS: "1"}, **pipes)
            started.append(process)
            if not _worked(process, name, results, errors):
                waiting.append((name, process, errors))
        while waiting:
            name, process, errors = waiting.pop(0)
            process.stdin.write("\n")
            process.stdin.flush()
            if not _worked(process, name, results, errors):
                waiting.append((name, process, errors))
    finally:
        for process in started:
            process.kill()  # nothing where it has ended
    return results


def _worked(process: subprocess.Popen, name: str, results: dict[str, dict[str, Any]], errors) -> bool:
    """Waits until a process passes its turn (False) or has ended (True; its result, if any, is in `results`)."""
    for line in process.stdout:
        if line.startswith(_TURN):
            return False
        if line.startswith(_MARK):
            results[name] = json.loads(line.removeprefix(_MARK))
    process.wait()
    if name not in results:
        told = ""
        if errors:
            errors.seek(0)
            told = errors.read()[-2000:]
        print(f"{name} failed:\n{told}", file=sys.stderr)
    return True


def measure_all(
    script: str,
    runs: Iterable[tuple[str, list[str]]],
    keep: Callable[[str, dict[str, Any]], None],
    jobs: int = 1,
    quiet: bool = True,
) -> bool:
    """Measures every run, several at a time, and hands each result over when it is there.

    Args:
        script: The calling script's `__file__`.
        runs: `(name, arguments)` of each; see `measure`.
        keep: Called with a name and its result, by one thread at a time: to write them down.
        jobs: How many processes at a time.
        quiet: See `measure`.

    Returns:
        Whether every run gave a result. One that does not costs the others nothing.
    """
    lock = threading.Lock()

    def one(name: str, arguments: list[str]) -> bool:
        result = measure(script, *arguments, quiet=quiet)
        if result is not None:
            with lock:
                keep(name, result)
        return result is not None

    return all(at_once(jobs, one, runs))


def compare_peers(
    script: str,
    groups: Iterable[Iterable[str]],
    limits: list[str],
    settings: dict[str, Any],
    output: Path,
    line: Callable[[str, dict[str, Any]], str],
) -> int:
    """Measures this project and other engines; writes the JSON after each group.

    Args:
        script: The calling script's `__file__`.
        groups: Peers that are measured in turns, group after group; a peer is what follows `--one` in its process.
        limits: The other arguments of each.
        settings: What was measured, for the JSON.
        output: The JSON: results, settings, machine and versions.
        line: `line(peer, result)` is printed; it may add to the result or take from it.

    Returns:
        The script's exit status. A peer that fails ends the comparison after its group.
    """
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.job.finetuning import versions

    found = versions()
    for name in ("torch", "transformers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    results: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(map(list, groups), start=1):
        measured = measure_in_turns(script, [(peer, ["--one", peer, *limits]) for peer in group])
        for peer in filter(measured.__contains__, group):
            print(line(peer, measured[peer]), flush=True)
            results[peer] = measured[peer] | {"group": number}
        write_json_atomic(output, {"results": results, "settings": settings, "machine": machine(), "versions": found})
        if len(measured) < len(group):
            return 1
    print(f"written to {output}")
    return 0


def at_once(jobs: int, function: Callable[..., Any], items: Iterable[tuple]) -> list[Any]:
    """`function(*item)` for every item, so many at a time; the results in the items' order.

    For functions that wait for a process of their own. Several share an accelerator if each takes only the memory it
    needs (`XLA_PYTHON_CLIENT_PREALLOCATE=false`).
    """
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda item: function(*item), items))
