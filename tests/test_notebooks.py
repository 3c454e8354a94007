"""House rules of the lessons, read from the files; nbval runs them. Each rule is shown to catch a bad notebook."""

import ast
import copy
import json
import re
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MOST_LINES = 25
SKIPPING = ("NBVAL_SKIP", "NBVAL_RAISES_EXCEPTION", "RAISES_EXCEPTION")
MACHINE_PATH = re.compile(r"(?:(?<![\w.:/+])|(?<=file://))/(?:home|root|tmp|work|Users)/[\w.-]+")


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    # nbval takes tags with dashes and in any case.
    return [tag.upper().replace("-", "_") for tag in cell.get("metadata", {}).get("tags", [])]


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and source(cell).strip()]


def texts(output: dict) -> Iterator[str]:
    """What an output shows as text, in whatever form."""
    yield "".join(output.get("text", ""))
    yield "\n".join(output.get("traceback", []))
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml":
            yield (
                value if isinstance(value, str) else "".join(map(str, value)) if isinstance(value, list) else str(value)
            )


def parsed(cell: dict) -> ast.Module:
    """The cell's Python, without the lines that are IPython's own."""
    lines = [line for line in source(cell).splitlines() if not line.lstrip().startswith(("%", "!", "?"))]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError:
        return ast.Module([], [])


def has_assert(cell: dict) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(parsed(cell)))


# --- the rules: each yields what is wrong -------------------------------------------------------------------


def not_executed(notebook: dict) -> Iterator[str]:
    for cell in code_cells(notebook):
        if cell.get("execution_count") is None:
            yield f"never executed: {source(cell)[:60]!r}"


def executed_out_of_order(notebook: dict) -> Iterator[str]:
    counts = [cell["execution_count"] for cell in code_cells(notebook) if cell.get("execution_count")]
    if counts != list(range(1, len(counts) + 1)):
        yield f"executed in the order {counts}: restart the kernel and run all"


def stored_stderr(notebook: dict) -> Iterator[str]:
    for cell in code_cells(notebook):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr" or output["output_type"] == "error":
                yield f"stored stderr or error: {''.join(texts(output))[:60]!r}"


def stored_widget(notebook: dict) -> Iterator[str]:
    """A page without a kernel shows a stored widget as an error, in place of the picture stored beside it."""
    if "widgets" in notebook.get("metadata", {}):
        yield "the metadata hold widgets: remove them"
    for cell in code_cells(notebook):
        for output in cell.get("outputs", []):
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                yield f"a stored widget: remove it and leave its picture: {source(cell)[:60]!r}"


def captured(notebook: dict) -> Iterator[str]:
    for cell in code_cells(notebook):
        if re.search(r"^\s*%%capture", source(cell), re.MULTILINE) or re.search(r"\bcapture_output\(", source(cell)):
            yield f"output captured: {source(cell)[:60]!r}"


def skipped(notebook: dict) -> Iterator[str]:
    for cell in notebook["cells"]:
        comments = re.findall(r"#\s*([A-Z_]+)", source(cell)) if cell["cell_type"] == "code" else []
        if {*comments, *tags(cell)} & {*SKIPPING}:
            yield f"skipped by nbval: {source(cell)[:60]!r}"


def ignored_without_assert(notebook: dict) -> Iterator[str]:
    cells = code_cells(notebook)
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        if "NBVAL_IGNORE_OUTPUT" not in source(cell) and "NBVAL_IGNORE_OUTPUT" not in tags(cell):
            continue
        if not has_assert(cell) and (following is None or not has_assert(following)):
            yield f"output ignored and nothing asserted: {source(cell)[:60]!r}"


def marker_without_effect(notebook: dict) -> Iterator[str]:
    """nbval reads its markers only where the comment has a line of its own."""
    for cell in code_cells(notebook):
        if re.search(r"^[ \t]*[^#\s].*#\s*NBVAL_", source(cell), re.MULTILINE):
            yield f"an nbval marker behind code: {source(cell)[:60]!r}"


def long_cell(notebook: dict) -> Iterator[str]:
    for cell in code_cells(notebook):
        lines = len(source(cell).strip("\n").splitlines())
        if lines > MOST_LINES:
            yield f"{lines} lines, at most {MOST_LINES}: {source(cell)[:60]!r}"


def image_without_alt(notebook: dict) -> Iterator[str]:
    for cell in code_cells(notebook):
        for output in cell.get("outputs", []):
            for kind in output.get("data", {}):
                alt = output.get("metadata", {}).get(kind, {}).get("alt", "")
                if kind.startswith("image/") and not alt.strip():
                    yield f"{kind} without alt text: {source(cell)[:60]!r}"


def no_figures_in_header(notebook: dict) -> Iterator[str]:
    first = notebook["cells"][0] if notebook["cells"] else {"cell_type": "", "source": ""}
    text = source(first) if first["cell_type"] == "markdown" else ""
    if not re.search(r"\d\s*(?:seconds|minutes?|min|s)\b", text):
        yield "the first cell tells no time"
    if not re.search(r"\d\s*(?:GB|MB|GiB|MiB)\b", text):
        yield "the first cell tells no memory"


def machine_path(notebook: dict) -> Iterator[str]:
    for cell in code_cells(notebook):
        for output in cell.get("outputs", []):
            for text in texts(output):
                for found in MACHINE_PATH.findall(text):
                    yield f"an output holds a path of this machine: {found}"


ALONE: list[Callable[[dict], Iterator[str]]] = [
    not_executed,
    executed_out_of_order,
    stored_stderr,
    stored_widget,
    captured,
    skipped,
    ignored_without_assert,
    marker_without_effect,
    long_cell,
    image_without_alt,
    no_figures_in_header,
    machine_path,
]


def broken_links(notebook: dict, folder: Path) -> Iterator[str]:
    for cell in notebook["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        text = re.sub(r"```.*?```|`[^`\n]*`", "", source(cell), flags=re.DOTALL)
        links = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"""(?:href|src)=["']([^"']+)""", text)
        for link in links:
            target = link.split("#")[0]
            if re.match(r"[a-z][a-z0-9+.-]*:|//", target) or not target or target.startswith("attachment:"):
                continue
            if target.startswith("/") or not (folder / target).exists():
                yield f"link to {target}, which is not there"


def functions(notebook: dict) -> dict[str, str]:
    """The functions and classes a notebook defines: `{what they do: name}`; layout and comments do not count."""
    nodes = [node for cell in code_cells(notebook) for node in parsed(cell).body]
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {ast.dump(node): node.name for node in nodes if isinstance(node, kinds)}


def shared(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """The names of what both define, of two notebooks' `functions`."""
    return [first[text] for text in first if text in second]


# --- the lessons -------------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", ALONE, ids=lambda rule: rule.__name__)
def test_every_notebook_keeps_the_rule(rule):
    assert {str(p): found for p in NOTEBOOKS if (found := list(rule(read(p))))} == {}


def test_every_link_to_a_file_leads_somewhere():
    assert {str(p): found for p in NOTEBOOKS if (found := list(broken_links(read(p), p.parent)))} == {}


def test_no_function_is_copied_from_notebook_to_notebook():
    defined = {str(path.relative_to(ROOT)): functions(read(path)) for path in NOTEBOOKS}
    copies = {(a, b): shared(defined[a], defined[b]) for a, b in combinations(defined, 2)}
    assert {pair: names for pair, names in copies.items() if names} == {}


# --- each rule catches what it is for ----------------------------------------------------------------------


def code(text, outputs=(), count=1, **metadata):
    cell = {"cell_type": "code", "source": text.splitlines(keepends=True), "execution_count": count}
    return cell | {"outputs": list(outputs), "metadata": metadata}


def markdown(text):
    return {"cell_type": "markdown", "source": text.splitlines(keepends=True), "metadata": {}}


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text.splitlines(keepends=True)}


def image(alt=None, kind="image/png"):
    metadata = {kind: {"alt": alt}} if alt is not None else {}
    return {"output_type": "display_data", "data": {kind: "iVBORw0"}, "metadata": metadata}


def shown(kind, value):
    return {"output_type": "execute_result", "data": {kind: value}, "metadata": {}}


HEADER = markdown("# Question\nOn two cores: 3 minutes, peak memory 2.5 GB.")
ASSERT = "error = 0.1\nassert error < 1"


def notebook(*cells, header=HEADER):
    numbered = copy.deepcopy([header, *cells])
    return {"cells": numbered, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


GOOD = notebook(
    code("import keras\nprint(1)", [stream("1\n")], 1),
    code("# NBVAL_IGNORE_OUTPUT\nplot()", [image("A curve that falls from 3 to 1.")], 2),
    code(ASSERT, count=3),
    code("print('https://host/home/page, a/tmp/b, 1/work')", [stream("https://host/home/page, a/tmp/b\n")], 4),
    code("", count=None),
    code("%time x = 1", [stream("ok\n")], 5, tags=["nbval-ignore-output"]),
    code("\n".join(["x = 1"] * 24 + ["assert x == 1"]), count=6),
    markdown("[a](https://x.org/a) [b](#part) `[c](none.md)` ![d](attachment:d.png)"),
)


def test_a_good_notebook_passes_every_rule(tmp_path):
    assert [found for rule in ALONE for found in rule(GOOD)] == []
    assert list(broken_links(GOOD, tmp_path)) == []


BAD = [
    (not_executed, notebook(code("x = 1", count=None))),
    (executed_out_of_order, notebook(code("x = 1", count=2), code("y = 1", count=1))),
    (executed_out_of_order, notebook(code("x = 1", count=7))),
    (stored_stderr, notebook(code("x", [stream("Warning\n", "stderr")]))),
    (stored_widget, {**notebook(code("x")), "metadata": {"widgets": {}}}),
    (stored_widget, notebook(code("x", [shown("application/vnd.jupyter.widget-view+json", {})]))),
    (stored_stderr, notebook(code("x", [{"output_type": "error", "traceback": ["ValueError"]}]))),
    (captured, notebook(code("%%capture\nprint(1)"))),
    (captured, notebook(code("# quiet\n%%capture out\nprint(1)"))),
    (captured, notebook(code("with io.capture_output() as out:\n    pass"))),
    (skipped, notebook(code("# NBVAL_SKIP\nx = 1"))),
    (skipped, notebook(code("x = 1  #NBVAL_SKIP"))),
    (skipped, notebook(code("# NBVAL_RAISES_EXCEPTION\nx"))),
    (skipped, notebook(code("# RAISES_EXCEPTION\nx"))),
    (skipped, notebook(code("x = 1", tags=["nbval-skip"]))),
    (skipped, notebook(code("x", tags=["raises-exception"]))),
    (ignored_without_assert, notebook(code("# NBVAL_IGNORE_OUTPUT\nx"))),
    (ignored_without_assert, notebook(code("x", tags=["nbval-ignore-output"]), code("y"), code(ASSERT))),
    (ignored_without_assert, notebook(code("# NBVAL_IGNORE_OUTPUT\nx"), code("print('assert')  # assert"))),
    (marker_without_effect, notebook(code("print(x)  # NBVAL_IGNORE_OUTPUT\nassert x"))),
    (marker_without_effect, notebook(code("for _ in y:\n    print(x)  #NBVAL_IGNORE_OUTPUT"))),
    (long_cell, notebook(code("\n".join(["x = 1"] * 26)))),
    (image_without_alt, notebook(code("plot()", [image()]))),
    (image_without_alt, notebook(code("plot()", [image(" ")]))),
    (image_without_alt, notebook(code("plot()", [image(kind="image/svg+xml")]))),
    (no_figures_in_header, notebook(header=markdown("# Question\n2.5 GB, quickly"))),
    (no_figures_in_header, notebook(header=markdown("# Question\n3 minutes, little memory"))),
    (no_figures_in_header, notebook(header=code("# 3 minutes, 2 GB"))),
    (machine_path, notebook(code("x", [stream("saved to /home/ann/run\n")]))),
    (machine_path, notebook(code("x", [stream("'/tmp/x1y2'\n")]))),
    (
        machine_path,
        notebook(code("x", [{"output_type": "execute_result", "data": {"text/plain": ["(/work/course)"]}}])),
    ),
    (machine_path, notebook(code("x", [{"output_type": "display_data", "data": {"text/html": "<b>/Users/ann</b>"}}]))),
    (
        machine_path,
        notebook(code("x", [{"output_type": "display_data", "data": {"application/json": {"a": "/root/x"}}}])),
    ),
]


@pytest.mark.parametrize(("rule", "bad"), BAD, ids=[f"{rule.__name__}-{n}" for n, (rule, _) in enumerate(BAD)])
def test_the_rule_catches_a_bad_notebook(rule, bad):
    assert list(rule(bad))


def test_there_is_a_bad_notebook_for_every_rule():
    assert {rule for rule, _ in BAD} == {*ALONE}


@pytest.mark.parametrize(
    "link", ["[a](none.md)", "![a](img/none.png)", "[a](/abs.md)", '<img src="no.png">', "[a](b c)"]
)
def test_a_link_to_nothing_is_caught(tmp_path, link):
    (tmp_path / "there.md").write_text("")
    assert list(broken_links(notebook(markdown(link)), tmp_path))
    assert not list(broken_links(notebook(markdown("[a](there.md) [b](there.md#part)")), tmp_path))


def test_a_copied_function_is_caught_wherever_it_stands():
    body = "def f(x):\n    return x + 1\n"
    one, other = notebook(code("%time\n" + body)), notebook(code("y = 2\n\n\n" + body + "z = 3"))
    assert shared(functions(one), functions(other)) == ["f"]
    assert shared(functions(one), functions(notebook(code(body.replace("1", "2"))))) == []


# --- what nbval is told to overlook ------------------------------------------------------------------------

NUMBERS = ["7", "12", "123456", "0.5", "91.7", "1e-05", "-3.25", "1,234", "0x1"]


def patterns(text: str) -> list[str]:
    return [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("regex:")]


def swallows_a_number(pattern: str) -> bool:
    return any(re.search(pattern, text) for number in NUMBERS for text in (number, f"loss {number}\n", f"[{number}]"))


def test_nbvals_patterns_swallow_no_bare_number():
    found = patterns((ROOT / "tests" / "nbval_sanitize.cfg").read_text())
    assert found
    assert [pattern for pattern in found if swallows_a_number(pattern)] == []


@pytest.mark.parametrize("pattern", [r"\d+", r"[0-9.]+( s)?", "loss .*", r"\d+\.\d+", ".*", "[0-9a-f]{4,}"])
def test_a_pattern_that_swallows_numbers_is_caught(pattern):
    assert swallows_a_number(*patterns(f"[name]\nregex: {pattern}\nreplace: X\n"))
