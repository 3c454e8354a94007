"""`make platforms`: the unit tests in throw-away environments that begin as a hosted runtime's do.

    python tests/platforms/run.py                      # every list beside this file
    python tests/platforms/run.py colab-gpu --tests tests/lora

For each list: an environment with what the list has, then the package as the lessons' setup cell installs it. What
the runtime must keep is compared before and after; then the unit tests run. Needs the package index, and for each
list about 10 minutes and 4 GB of disk on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
#: What a hosted runtime keeps, whatever is installed there: its JAX with plugins, and what other notebooks rely on.
KEPT = re.compile(r"jax|jaxlib|jax-cuda.*|libtpu|numpy|protobuf|tensorflow")
#: What the unit tests need beside the package.
TOOLS = ("pytest", "pytest-xdist", "pyyaml", "packaging", "nbformat", "nbconvert", "ipykernel")


def python_for(text: str) -> str:
    """The first interpreter that a list's `# python:` line names and this machine has, else the one that runs."""
    wanted = re.search(r"^# python: (.*)$", text, re.MULTILINE)
    found = (shutil.which(f"python{version}") for version in (wanted[1].split() if wanted else []))
    works = (path for path in found if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0)
    return next(works, sys.executable)


def versions(python: Path) -> dict[str, str]:
    """The installed packages of an environment that a hosted runtime keeps."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True, text=True
    )
    packages = {entry["name"].lower(): entry["version"] for entry in json.loads(listed.stdout)}
    return {name: version for name, version in packages.items() if KEPT.fullmatch(name)}


def check(name: str, tests: list[str]) -> int:
    """Builds one environment, compares, runs the tests; returns 0 where all is well."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    folder = ROOT / f".venv-platform-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python_for(text), "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*install, "-r", FOLDER / f"{name}.txt"], check=True)
    before = versions(python)
    subprocess.run([*install, "-e", f"{ROOT}[weights,lessons,data]", *TOOLS], check=True)
    after = versions(python)
    replaced = [
        f"{package} {old} -> {after.get(package)}" for package, old in before.items() if after.get(package) != old
    ]
    print(f"{name}: {', '.join(replaced) or 'nothing that must stay was replaced'}", flush=True)
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--ignore", "tests/parity", *tests]
    failed = subprocess.run(command, cwd=ROOT).returncode
    shutil.rmtree(folder)
    return int(bool(replaced or failed))


def main() -> int:
    lists = sorted(path.stem for path in FOLDER.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="LIST", help=f"which of: {', '.join(lists)} (all)")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what pytest runs (tests)")
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.names) - set(lists)):
        parser.error(f"{unknown[0]}: no such list. There are {', '.join(lists)}.")
    failed = [name for name in chosen.names or lists if check(name, chosen.tests)]
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
