"""What a job does with its data's notices, its template and validation lines, and with a start that fails."""

import io
import json

import pytest
from rich.console import Console

from gemma_lora.base.files import GemmaLoraError, write_jsonl_atomic
from gemma_lora.data.templates import Template
from gemma_lora.job import finetuning as job
from gemma_lora.job import folder, stages
from tests.job.test_job import TEMPLATE, jsonl, rows, small_model


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Starts a job that fails when the base is asked; gives the data it had by then, and what was shown."""

    def start(**named):
        seen = []

        def fail(model, dataset, tests, settings, console):
            assert (tmp_path / "runs" / "mine" / "settings.json").exists()
            seen.append((dataset, tests))
            raise GemmaLoraError("no memory")

        monkeypatch.setattr(stages, "load_gemma", lambda source, **how: small_model())
        monkeypatch.setattr(stages, "answers_before", fail)
        console = Console(file=io.StringIO(), width=400)
        with pytest.raises(GemmaLoraError, match="no memory"):
            job.finetune(job.Settings(run_dir=str(tmp_path / "runs" / "mine"), **named), console)
        return *seen[0], console.file.getvalue()

    return start


def test_notices_are_shown_once_on_the_jobs_console(begun, tmp_path, capsys):
    data = jsonl(tmp_path / "a.jsonl", [row | {"[id]": 1} for row in rows(9)])
    dataset, _, shown = begun(data=str(data))
    assert dataset.notices and all(shown.count(notice) == 1 for notice in dataset.notices)
    assert "'[id]' (9 lines)" in shown and capsys.readouterr().out == ""


def test_template_and_validation_lines_are_those_asked_for(begun, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", rows(9))
    mine = jsonl(tmp_path / "v.jsonl", rows(2, start=50))
    (tmp_path / "t.json").write_text(json.dumps(TEMPLATE))
    for given, template in (("chat", Template.gemma_chat()), (str(tmp_path / "t.json"), Template.from_dict(TEMPLATE))):
        dataset, tests, shown = begun(data=str(data), template=given, validation=str(mine))
        assert dataset.template == template and "(as asked for)" in shown
        assert [e.prompt for e in dataset.validation] == ["50", "51"] and len(dataset.train) == 9
        assert tests == {"validation": dataset.validation}


def test_a_start_that_failed_leaves_no_folder_of_its_own(begun, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", rows(9))
    begun(data=str(data))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "notes.txt").touch()
    begun(data=str(data))
    assert [path.name for path in (tmp_path / "runs" / "mine").iterdir()] == ["notes.txt"]


def test_a_run_that_began_keeps_its_folder(tmp_path):
    settings = job.Settings(run_dir=str(tmp_path / "run"))
    with pytest.raises(OSError), folder.claimed(settings, "a"):
        (tmp_path / "run" / "before.json").touch()
        raise OSError
    assert (tmp_path / "run" / "settings.json").exists()


def test_answers_with_line_separators_are_read_back(tmp_path):
    kept = [{"prompt": "a\u2028b\x85c", "after": "\u2029\x0b\x0c\x1c d\n"}, {"prompt": "e"}]
    write_jsonl_atomic(tmp_path / "answers.jsonl", kept)
    assert folder.stored_rows(tmp_path) == kept
