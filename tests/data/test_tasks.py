"""The sales messages and the questions: same bytes when rebuilt, splits apart, every answer follows from its prompt."""

import hashlib
import importlib.util
import json
import re
import sys
from datetime import date
from pathlib import Path

import pytest

from gemma_lora.data import Template, load_dataset

DATA = Path(__file__).resolve().parents[2] / "data"
COUNTS = {
    "sales": {"train": 1200, "validation": 150, "test": 150, "test_unseen": 150},
    "questions": {"train": 497, "validation": 68, "test": 68, "test_unseen": 112},
}
NOT_SAID = "The passage does not say."


def generator(task):
    """A task's `prepare.py` as a module; the other modules of its folder are its own."""
    folder = DATA / task
    spec = importlib.util.spec_from_file_location(f"prepare_{task}", folder / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    path, own = list(sys.path), sys.modules.pop("vocabulary", None)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
        sys.modules.pop("vocabulary", None)
        if own is not None:
            sys.modules["vocabulary"] = own
    return module


def stored(task, split):
    """The lines of a stored split, as (prompt, response)."""
    rows = [json.loads(line) for line in (DATA / task / f"{split}.jsonl").read_text("utf-8").splitlines()]
    return [(row["prompt"], row["response"]) for row in rows]


@pytest.mark.parametrize("task", COUNTS)
def test_rebuilding_gives_the_stored_bytes(task):
    prepare = generator(task)
    sums = dict(reversed(line.split()) for line in (DATA / task / "SHA256SUMS").read_text().splitlines())
    readme = (DATA / task / "README.md").read_text("utf-8")
    built = prepare.build()
    assert {split: len(lines) for split, lines in built.items()} == COUNTS[task]
    for split, lines in built.items():
        content = (DATA / task / f"{split}.jsonl").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert content == prepare.task_files.to_jsonl(lines) and digest == sums[f"{split}.jsonl"]
        assert f"| `{split}.jsonl` | {len(lines):,} | `{digest}` |" in readme


@pytest.mark.parametrize("task", COUNTS)
def test_check_finds_a_changed_file(task, tmp_path, capsys):
    prepare = generator(task)
    assert prepare.main(["--output", str(tmp_path)]) == 0
    assert prepare.main(["--check", "--output", str(tmp_path)]) == 0
    with (tmp_path / "test.jsonl").open("a") as stream:
        stream.write("\n")
    assert prepare.main(["--check", "--output", str(tmp_path)]) == 1
    assert "differs: test.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("task", COUNTS)
def test_the_package_reads_the_folder(task):
    dataset = load_dataset(DATA / task)
    splits = {"train": dataset.train, "validation": dataset.validation, **dataset.tests}
    assert {split: len(examples) for split, examples in splits.items()} == COUNTS[task]
    assert dataset.template == Template("{prompt}\n", "{response}<eos>", ("<eos>",)) and not dataset.skipped


@pytest.mark.parametrize("task", COUNTS)
def test_splits_share_no_prompt(task):
    prompts = [prompt for split in COUNTS[task] for prompt, _ in stored(task, split)]
    assert len(set(prompts)) == len(prompts)


# --- sales --------------------------------------------------------------------------------------------------------

FIELDS = ["name", "company", "product", "quantity", "budget", "currency", "deadline", "contact"]
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "eight": 8, "ten": 10}
NUMBERS |= {"a dozen": 12, "fifteen": 15, "twenty": 20}
MONEY = {
    "EUR": ("€", "EUR", "euros"),
    "USD": ("US$", "USD", "US dollars"),
    "GBP": ("£", "GBP", "pounds"),
    "INR": ("₹", "INR", "rupees"),
    "JPY": ("JPY", "yen"),
    "CHF": ("CHF", "francs"),
    "SEK": ("SEK", "kronor"),
    "BRL": ("R$", "BRL"),
    "ZAR": ("ZAR", "rand"),
    "CAD": ("CA$", "CAD"),
}


def dates_in(text):
    """Every date in ISO 8601 or with its month in words."""
    found = set(re.findall(r"\d{4}-\d{2}-\d{2}", text))
    months = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
    for day, month, year in re.findall(r"(\d{1,2}) ([A-Z][a-z]{2,}) (\d{4})", text):
        found.add((year, month, day))
    for month, day, year in re.findall(r"([A-Z][a-z]{2,}) (\d{1,2}), (\d{4})", text):
        found.add((year, month, day))
    return {
        entry
        if isinstance(entry, str)
        else date(int(entry[0]), months.index(entry[1][:3].lower()) + 1, int(entry[2])).isoformat()
        for entry in found
        if isinstance(entry, str) or entry[1][:3].lower() in months
    }


def amounts_in(text, currency):
    """Every amount that stands beside a mark of the currency."""
    number = r"(\d[\d,]*)(k?)"
    marks = "|".join(re.escape(mark) for mark in MONEY[currency])
    hits = re.findall(rf"(?:{marks}) ?{number}", text) + re.findall(rf"{number} ?(?:{marks})", text)
    return {int(digits.replace(",", "")) * (1000 if kilo else 1) for digits, kilo in hits}


def quantities_in(text, product):
    """Every number that stands before the product, or in a form."""
    found = set()
    for before in re.findall(rf"(\w+(?: dozen)?) (?:x )?{product}", text):
        found.add(int(before) if before.isdigit() else NUMBERS.get(before))
    return found | {int(number) for number in re.findall(r"(?:Qty|Quantity|pieces|How many)\W+(\d+)", text)}


@pytest.mark.parametrize("split", COUNTS["sales"])
def test_each_record_follows_from_its_message(split):
    for prompt, response in stored("sales", split):
        record = json.loads(response)
        assert list(record) == FIELDS
        for field in ("name", "company", "contact"):
            assert record[field] is None or record[field] in prompt, (field, prompt)
        assert record["product"].removesuffix("x") in prompt
        if record["quantity"] is not None:
            assert record["quantity"] in quantities_in(prompt, record["product"]), prompt
        assert (record["budget"] is None) == (record["currency"] is None)
        if record["budget"] is not None:
            assert record["budget"] in amounts_in(prompt, record["currency"]), prompt
        assert dates_in(prompt) == ({record["deadline"]} if record["deadline"] else set()), prompt
        contacts = re.findall(r"[\w.]+@[\w.]+\.example|\+\d+ 555 \d{3} \d{4}", prompt)
        assert contacts == ([record["contact"]] if record["contact"] else []), prompt


def test_what_is_missing_is_null_often_enough():
    records = [json.loads(response) for _, response in stored("sales", "train")]
    for field in FIELDS:
        share = sum(record[field] is None for record in records) / len(records)
        assert share == 0 if field == "product" else 0.1 <= share <= 0.6, (field, share)


def test_unseen_people_companies_and_products_occur_nowhere_else():
    def values(split, field):
        found = [json.loads(response)[field] for _, response in stored("sales", split)]
        return {value for value in found if value}

    others = ("train", "validation", "test")
    texts = "\n".join(prompt for split in others for prompt, _ in stored("sales", split))
    for field in ("name", "product"):
        assert not any(value in texts for value in values("test_unseen", field))
    assert not any(value.split()[0] in texts for value in values("test_unseen", "company"))
    prepare = generator("sales")
    own, trained = prepare.vo.PARTS["test_unseen"], prepare.vo.PARTS["train"]
    assert own.keys() == trained.keys()
    for part in own:
        assert not {phrase for phrase in own[part] if phrase} & set(trained[part])


# --- questions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", COUNTS["questions"])
def test_each_answer_stands_in_its_passage(split):
    lines = stored("questions", split)
    passages = {passage.text: dict(passage.questions) for passage in generator("questions").read_passages()}
    for prompt, answer in lines:
        shown = {text: asked for text, asked in passages.items() if text in prompt}
        assert 1 <= len(shown) <= 2
        own = [asked[question] for asked in shown.values() for question in asked if question in prompt]
        if answer == NOT_SAID:
            assert len(shown) == 1 and set(own) <= {NOT_SAID}, prompt
        else:
            assert answer in own and sum(answer in text for text in shown) >= 1, prompt
    share = sum(answer == NOT_SAID for _, answer in lines) / len(lines)
    assert 0.12 <= share <= 0.45, share


def test_each_passage_is_well_formed():
    passages = generator("questions").read_passages()
    assert len(passages) >= 40 and len({passage.name for passage in passages}) == len(passages)
    for passage in passages:
        assert len(passage.questions) == 12 and len(dict(passage.questions)) == 12, passage.name
        for question, answer in passage.questions:
            assert question.endswith("?"), question
            assert answer == NOT_SAID or (answer in passage.text and len(answer.split()) <= 9), (passage.name, answer)
        assert 40 <= len(passage.text.split()) <= 90, passage.name


def test_no_question_about_a_passage_stands_in_two_splits_and_unseen_passages_in_one():
    passages = generator("questions").read_passages()
    asked = {}
    for split in COUNTS["questions"]:
        for prompt, _ in stored("questions", split):
            for passage in passages:
                if passage.text in prompt:
                    assert passage.unseen == (split == "test_unseen")
                    for question, _answer in passage.questions:
                        if question in prompt:
                            asked.setdefault((passage.name, question), set()).add(split)
    assert len(asked) >= 400 and all(len(splits) == 1 for splits in asked.values())


# --- the kept adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", COUNTS)
def test_the_readme_says_what_the_kept_adapters_run_measured(task):
    metrics = json.loads((DATA / task / "adapter/metrics.json").read_text())
    readme = (DATA / task / "README.md").read_text(encoding="utf-8")
    for split, after in metrics["after"].items():
        found = after["scores"]["exact match"]
        before = f"{metrics['before'][split]['exact_match']:.1%}".replace("0.0%", "0%").replace("%", " %")
        value, low, high = (f"{100 * found[name]:.1f}" for name in ("value", "low", "high"))
        assert f"| `{split}` | {before} | {value} % ({low} to {high}) |" in readme
    perplexity = metrics["english_perplexity"]
    assert f"rose from {perplexity['before']:.1f} to {perplexity['after']:.1f}" in readme


@pytest.mark.parametrize("task", COUNTS)
def test_the_kept_adapters_run_had_no_option_and_this_data(task):
    settings = json.loads((DATA / task / "adapter/settings.json").read_text())
    metrics = json.loads((DATA / task / "adapter/metrics.json").read_text())
    assert settings["data"] == f"data/{task}" and settings["limit"] is None
    assert metrics["lines"] == {name: COUNTS[task][name] for name in ("train", "validation")}
    config = json.loads((DATA / task / "adapter/adapter_config.json").read_text())
    assert config["r"] == settings["rank"] == 16
