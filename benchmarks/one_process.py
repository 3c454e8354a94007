"""A measurement in a process of its own: its peak of memory is its own, and nothing is left from the one before."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_MARK = "RESULT "


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
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if found:
        return json.loads(found[-1].removeprefix(_MARK))
    print(f"{' '.join(arguments)} failed:\n{(done.stderr or '')[-2000:]}", file=sys.stderr)
    return None


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
    peers: Iterable[str],
    limits: list[str],
    settings: dict[str, Any],
    output: Path,
    line: Callable[[str, dict[str, Any]], str],
    rounds: int = 1,
    middle: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> int:
    """Measures this project and other engines, one process after another; writes the JSON after each.

    A machine drifts: with several rounds each peer is measured several times, in turns.

    Args:
        script: The calling script's `__file__`.
        peers: What follows `--one` in each process.
        limits: The other arguments of each.
        settings: What was measured, for the JSON.
        output: The JSON: results, settings, machine and versions.
        line: `line(peer, result)` is printed; it may add to the result or take from it.
        rounds: How often each peer is measured.
        middle: With more than one round, makes one result of a peer's, which are kept in it as "rounds"; without it
            the last one stands.

    Returns:
        The script's exit status. A peer that fails ends the comparison and costs its own time only.
    """
    from gemma_lora.files import write_json_atomic
    from gemma_lora.hardware import machine
    from gemma_lora.job import versions

    found = versions()
    for name in ("torch", "transformers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    results: dict[str, dict[str, Any]] = {}
    taken: dict[str, list[dict[str, Any]]] = {}
    for peer in list(peers) * rounds:
        result = measure(script, "--one", peer, *limits)
        if result is None:
            return 1
        print(line(peer, result), flush=True)
        taken.setdefault(peer, []).append(result)
        results[peer] = middle(taken[peer]) | {"rounds": taken[peer]} if middle and rounds > 1 else result
        write_json_atomic(output, {"results": results, "settings": settings, "machine": machine(), "versions": found})
    print(f"written to {output}")
    return 0


def at_once(jobs: int, function: Callable[..., Any], items: Iterable[tuple]) -> list[Any]:
    """`function(*item)` for every item, so many at a time; the results in the items' order.

    For functions that wait for a process of their own. Several share an accelerator if each takes only the memory it
    needs (`XLA_PYTHON_CLIENT_PREALLOCATE=false`).
    """
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda item: function(*item), items))
