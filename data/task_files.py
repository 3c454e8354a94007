"""The files of a generated task: JSONL splits, SHA256SUMS, the README's table; the command that writes or checks them.

Each task's `prepare.py` makes the lines and calls `main`.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from gemma_lora.base.files import atomic_path


def to_jsonl(lines: list[dict[str, str]]) -> bytes:
    """The bytes of a split's file."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def with_table(readme: str, counts: dict[str, int], sums: dict[str, str]) -> str:
    """A README with the table of its splits between the checksum marks."""
    rows = [f"| `{split}.jsonl` | {counts[split]:,} | `{digest}` |" for split, digest in sums.items()]
    table = ["<!-- checksums -->", "| file | lines | SHA-256 |", "|---|---:|---|", *rows, "<!-- /checksums -->"]
    return re.sub(r"<!-- checksums -->.*<!-- /checksums -->", lambda _: "\n".join(table), readme, flags=re.S)


def main(
    build: Callable[[], dict[str, list[dict[str, str]]]],
    folder: Path,
    description: str,
    arguments: list[str] | None = None,
) -> int:
    """Builds or checks a task's files.

    Args:
        build: Gives the lines of every split, by the split's name.
        folder: The task's folder, where the files go if `--output` does not say otherwise.
        description: What is built, for `--help`.
        arguments: The command's arguments; None takes those of the process.

    Returns:
        The exit status: 1 if `--check` found a file that differs from what would be built.
    """
    script = f"  python data/{folder.name}/prepare.py"
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{script}\n{script} --check\n{script} --output DIR",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a file differs from what would be built"
    )
    parser.add_argument("--output", type=Path, default=folder, help="folder to write to (default: the task's)")
    chosen = parser.parse_args(arguments)
    built = build()
    files = {f"{split}.jsonl": to_jsonl(lines) for split, lines in built.items()}
    sums = {split: hashlib.sha256(files[f"{split}.jsonl"]).hexdigest() for split in built}
    files["SHA256SUMS"] = "".join(f"{digest}  {split}.jsonl\n" for split, digest in sums.items()).encode()
    if chosen.check:
        stored = {name: chosen.output / name for name in files}
        differing = [name for name, path in stored.items() if not path.exists() or path.read_bytes() != files[name]]
        print("differs: " + ", ".join(differing) if differing else "all files are as built")
        return 1 if differing else 0
    readme = chosen.output / "README.md"
    counts = {split: len(lines) for split, lines in built.items()}
    if readme.exists():
        files[readme.name] = with_table(readme.read_text("utf-8"), counts, sums).encode()
    for name, content in files.items():
        with atomic_path(chosen.output / name) as temporary:
            temporary.write_bytes(content)
    print("\n".join(f"{split}: {counts[split]} lines, {digest[:12]}" for split, digest in sums.items()))
    return 0
