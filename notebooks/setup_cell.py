"""The lessons' first cell, the same in each, with the badges and metadata that go with it.

    python notebooks/setup_cell.py            # put it into every lesson; run again after a merge
    python notebooks/setup_cell.py --check    # say which lessons have another

It changes the setup cell, the header's part "Run it elsewhere", the numbers of execution, and what the setup cell makes
needless in the cell of imports. `COURSE` and `ACCELERATED` are the one place for the course's address and for the
lessons that ask for a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from pathlib import Path

#: The course's public address, such as "https://github.com/owner/name"; unset, since it has none yet.
COURSE = ""
#: Lessons that ask Colab and Kaggle for a GPU: their cells take minutes on a CPU.
ACCELERATED = ("08_gemma_lora", "09_gemma_qlora", "your_data")

FOLDER = Path(__file__).parent
CELL_ID = "setup"
MOST_LINES = 12
_CLONE = """\
    os.system("git clone -q --depth=1 {course} course")
"""
_CELL = """\
# NBVAL_IGNORE_OUTPUT
# The same in every lesson: finds or installs the course, sets backend and precision, looks at the device.
import glob, importlib.util, os, subprocess, sys

if not importlib.util.find_spec("gemma_lora"):
{clone}    names = ("../pyproject.toml", "course/pyproject.toml", "gemma_lora*.whl", "/kaggle/input/**/gemma_lora*.whl")
    found = [path for name in names for path in glob.glob(name, recursive=True)]
    assert found, "Put the course's wheel (`make portable`) beside this notebook, or attach it on Kaggle as a data set."
    pip = [sys.executable, "-m", "pip", "install", "-q", "--retries=1", "-f", os.path.dirname(found[0]) or "."]
    subprocess.run([*pip, found[0].removesuffix("/pyproject.toml") + "[weights,lessons]"], check=True)
ROOT = importlib.import_module("gemma_lora.course.setup").begin()"""
_ELSEWHERE = """\
**Run it elsewhere.** On Colab, on Kaggle or in a Jupyter of your own the first cell installs the course and leaves the
session's own JAX and NumPy alone; it stops, and says what to do, where there is a GPU or TPU that JAX does not use.
{where}
`constraints.txt` is for fresh environments: never apply it in a live session."""
_NO_ADDRESS = """\
The course has no public address yet: take the folder that `make portable` writes, put its files beside the notebook
on Colab, or attach the folder on Kaggle as a data set."""


def cell_source(course: str = COURSE) -> str:
    """The setup cell's text."""
    return _CELL.format(clone=_CLONE.format(course=course) if course else "")


def elsewhere(name: str, course: str = COURSE) -> str:
    """The header's part "Run it elsewhere" of a lesson, with badges where the course has an address."""
    owner = course.removeprefix("https://github.com/").removesuffix(".git")
    file = f"github.com/{owner}/blob/main/notebooks/{name}.ipynb"
    badges = (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/{file.replace('github.com', 'github', 1)})\n"
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
        f"(https://kaggle.com/kernels/welcome?src=https://{file})"
    )
    return _ELSEWHERE.format(where=badges if course else _NO_ADDRESS)


def metadata(name: str) -> dict:
    """What Colab and Kaggle read in a lesson's metadata: whether it wants a GPU."""
    if name not in ACCELERATED:
        return {}
    return {"accelerator": "GPU", "colab": {"gpuType": "T4"}, "kaggle": {"accelerator": "nvidiaTeslaT4"}}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def with_setup(notebook: dict, name: str, output: str, course: str = COURSE) -> dict:
    """The lesson with the setup cell, changed in place; a second time changes nothing.

    Args:
        notebook: As `json` reads it.
        name: Its file's name without the ending.
        output: What the cell prints here, stored where it has no output yet.
        course: The course's address.
    """
    cells = notebook["cells"]
    header = "".join(cells[0]["source"])
    before, marker, _ = header.partition("**Run it elsewhere.**")
    cells[0]["source"] = lines((before if marker else header.rstrip("\n") + "\n\n") + elsewhere(name, course))
    setup = next((cell for cell in cells if cell.get("id") == CELL_ID), None)
    if setup is None:
        printed = [{"name": "stdout", "output_type": "stream", "text": lines(output)}] if output else []
        setup = {"cell_type": "code", "execution_count": 1, "id": CELL_ID, "metadata": {}, "outputs": printed}
        cells.insert(1, setup | {"source": []})
        setup = cells[1]
    setup["source"] = lines(cell_source(course))
    _without_old_lines(cells[cells.index(setup) + 1 :])
    _number(cells)
    for key in ("accelerator", "colab", "kaggle"):
        notebook["metadata"].pop(key, None)
    notebook["metadata"] |= metadata(name)
    return notebook


def _without_old_lines(cells: list[dict]) -> None:
    """Takes from the cell of imports what the setup cell does: the backend, ROOT, and imports only they used."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    if not code:
        return
    text = "".join(code[0]["source"])
    text = re.sub(r'^os\.environ\["KERAS_BACKEND"\] = "jax".*\n+', "", text, flags=re.MULTILINE)
    text = re.sub(r"^ROOT = Path\.cwd\(\) if .*\n?", "", text, flags=re.MULTILINE).rstrip("\n")
    rest = "\n".join("".join(cell["source"]) for cell in code[1:])
    for line, used in ((r"import os\n+", r"\bos\."), (r"from pathlib import Path(?:\n|$)", r"\bPath\b")):
        without = re.sub(f"^{line}", "", text, flags=re.MULTILINE)
        if without != text and not re.search(used, without + rest):
            text = without
    text = re.sub(r"^import os\n\n(?=import|from)", "import os\n", text.strip("\n"), flags=re.MULTILINE)
    code[0]["source"] = lines(text)


def _number(cells: list[dict]) -> None:
    """Numbers the executed cells in order, as after "Restart and run all"."""
    count = 0
    for cell in cells:
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip():
            count += 1
            cell["execution_count"] = count
            for output in cell["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = count


def written(notebook: dict) -> str:
    """The file's text, as Jupyter writes it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="lessons (all in this folder)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a lesson differs")
    chosen = parser.parse_args()
    paths = chosen.files or sorted(FOLDER.glob("*.ipynb"))
    output, differ = "", []
    for path in paths:
        old = path.read_text(encoding="utf-8")
        if not chosen.check and f'"id": "{CELL_ID}"' not in old and not output:
            output = printed_here()
        new = written(with_setup(json.loads(old), path.stem, output))
        if new != old:
            differ.append(path.name)
            if not chosen.check:
                path.write_text(new, encoding="utf-8")
    print(f"{'Differ' if chosen.check else 'Written'}: {', '.join(differ) or 'none'}")
    return int(chosen.check and bool(differ))


def printed_here() -> str:
    """What the setup cell prints on this machine."""
    sys.path.insert(0, str(FOLDER.parent))
    from gemma_lora.course.setup import begin

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        begin(FOLDER)
    return printed.getvalue()


if __name__ == "__main__":
    sys.exit(main())
