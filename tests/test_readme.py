"""README's tables are those of benchmarks/results, and its links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def tables(benchmark_script):
    return benchmark_script("readme_tables")


def test_the_tables_are_those_of_the_results(tables):
    assert tables.filled(README) == README, "run: python benchmarks/readme_tables.py"
    assert set(re.findall(r"<!-- table (\w+) -->", README)) == set(tables.TABLES)


def test_a_changed_result_changes_its_table(tables, tmp_path, monkeypatch):
    record = json.loads((tables.RESULTS / "qlora_step.json").read_text())
    record["results"]["lora"]["peak_bytes"] = 99e9
    (tmp_path / "qlora_step.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = "before\n<!-- table qlora_step -->\nold\n<!-- end -->\nafter\n"
    new = tables.filled(text)
    assert "| 99.0 GB |" in new and "old" not in new
    assert new.startswith("before\n<!-- table qlora_step -->\n| frozen") and new.endswith("|\n<!-- end -->\nafter\n")


def test_methods_show_the_spread_of_their_seeds_and_leave_out_what_was_not_run(tables):
    def run(share):
        scores = {split: {"exact_match": share} for split in ("test", "test_unseen")}
        more = {"trained_parameters": 3_800_000, "adapter_bytes": None, "peak_memory_bytes": 2.5e9, "rate": 5e-4}
        return {"scores": scores, "english_perplexity": 50.0, **more}

    runs = {"final/full/0": run(0.5), "final/full/1": run(0.7), "final/int8/0": {"failed": "NaN"}, "rate/nf4/0.1": {}}
    lines = tables.methods({"runs": runs}).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| full fine-tuning | 0.0005 | 60.0 (50.0–70.0) | 60.0 (50.0–70.0) | 50 | 3.80 M | – |")


def test_links_to_files_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets and all((ROOT / target).exists() for target in targets)
