"""The pages' tables are those of benchmarks/results; their links lead somewhere; README is one screen."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture
def tables(benchmark_script):
    return benchmark_script("readme_tables")


def test_the_tables_are_those_of_the_results(tables):
    found = set()
    for page in tables.PAGES:
        assert tables.filled(text_of(page)) == text_of(page), "run: python benchmarks/readme_tables.py"
        found |= set(re.findall(r"<!-- table (\w+) -->", text_of(page)))
    assert found == set(tables.TABLES)


def test_readme_is_one_screen_and_names_every_page_and_lesson():
    assert len(README.splitlines()) <= 150
    for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")):
        assert f"]({path.relative_to(ROOT).as_posix()})" in README, path.name


def test_a_changed_result_changes_its_table(tables, tmp_path, monkeypatch):
    record = json.loads((tables.RESULTS / "qlora_step.json").read_text())
    record["results"]["lora"]["peak_bytes"] = 99e9
    (tmp_path / "qlora_step.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = "before\n<!-- table qlora_step -->\nold\n<!-- end -->\nafter\n"
    new = tables.filled(text)
    assert "| 99.0 GB |" in new and "old" not in new
    assert new.startswith("before\n<!-- table qlora_step -->\n| frozen") and new.endswith("|\n<!-- end -->\nafter\n")


def test_what_finetuning_changed_has_a_row_a_split_and_a_dash_for_what_was_not_scored_before(tables):
    scores = {name: {"exact_match": 0.855, "count": 7} for name in ("test", "test_unseen", "test_new_locales")}
    before = {"test": {"exact_match": 0.0625, "count": 64}, "test_unseen": {"exact_match": 0.5, "count": 64}}
    metrics = {"before": before, "after": scores, "english_perplexity": {"before": 39.72, "after": 56.0}}
    assert tables.finetune({"metrics": metrics}).splitlines()[2:] == [
        "| `test` | 7 | 6 % | 85.5 % |",
        "| `test_unseen` | 7 | 50 % | 85.5 % |",
        "| `test_new_locales` | 7 | – | 85.5 % |",
        "| perplexity on English text |  | 39.7 | 56.0 |",
    ]


def test_the_kept_adapter_is_of_the_run_that_is_reported(tables):
    record = json.loads((tables.RESULTS / "finetune.json").read_text())
    kept = {
        name: json.loads((ROOT / f"data/expenses/adapter/{name}.json").read_text()) for name in ("metrics", "settings")
    }
    assert kept["metrics"] == record["metrics"] and kept["settings"] == record["settings"]


def test_methods_show_the_best_rate_the_spread_of_seeds_and_a_dash_for_what_was_not_run(tables):
    def run(share, rate=5e-4, loss=0.03, **more):
        scores = {split: {"exact_match": share} for split in ("validation", "validation_unseen", "test", "test_unseen")}
        way = {"lines": 2400, "validation_on_the_way": {"600": share / 2, "1200": share + 0.2}}
        return {"scores": scores, "rate": rate, "validation_loss": loss, "trained_parameters": 3_800_000} | way | more

    runs = {
        "rate/full/1e-05": run(0.25, 1e-5, 0.04),
        "rate/full/3e-05": run(0.75, 3e-5, 0.03),
        "rate/full/0.0001": {"failed": "NaN"},
        "final/full/0": run(0.5, english_perplexity=50.0),
        "final/full/1": run(0.9, english_perplexity=60.0),
        "time/full/0": {"peak_memory_bytes": 2.5e9, "median_step_seconds": 3.21},
        "rate/nf4/0.001": run(0.5, 1e-3, 0.05),
        "rate/int8/0.001": {"failed": "NaN"},
        "same/nf4/0": run(0.8, english_perplexity=61.0),
    }
    lines = tables.methods({"runs": runs, "settings": {"lines": {"rate": 400, "final": 2400}}}).splitlines()
    both = "70.0 (50.0–90.0)"
    assert lines[2:] == [
        f"| full fine-tuning | 3.80 M | 3e-05 | 0.030 | 75 | {both} | {both} | 1,200 | 55 | 2.5 GB | 3.2 |",
        "| NF4 base, LoRA | 3.80 M | 0.001 | 0.050 | 50 | – | – | – | – | – | – |",
        "| NF4 base, LoRA, at LoRA's rate | 3.80 M | 0.0005 | – | – | 80.0 | 80.0 | 1,200 | 61 | – | – |",
    ]


# --- links -------------------------------------------------------------------------------------------------

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("data/*/*.md")])


def anchors(text: str) -> set[str]:
    """The names that a page's headings have as targets of links."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Links of a page in `folder` to files or headings that are not there; those to other sites are not tried."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path = folder / target
        if target and (target.startswith("/") or not path.exists()):
            broken.append(link)
        elif anchor and (not target or path.suffix == ".md"):
            there = path.read_text(encoding="utf-8") if target else text
            broken += [link] * (anchor not in anchors(there))
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken_links(page.read_text(encoding="utf-8"), page.parent) == []


def test_the_pages_are_those_that_users_open():
    names = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md", "benchmarks/README.md"} <= names


@pytest.mark.parametrize("link", ["no_such_file.md", "README.md#no-such-heading", "#no-such-heading", "/README.md"])
def test_a_link_to_nothing_is_found(link):
    assert broken_links(
        f"# A heading\n[a](https://x.org) [b](README.md#the-course) [c](#a-heading) [d]({link})", ROOT
    ) == [link]
