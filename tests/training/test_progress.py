"""What `fit` prints: its plan, a line that moves in a terminal, plain lines in a file; compiling is said apart."""

import io
import re
import sys

import pytest

from gemma_lora.training import progress
from tests.training.conftest import arrays, small_tuner


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Tuner:
    """What the line reads of a tuner."""

    compiles_next, compiled_last, batch_losses, batch_loss = True, False, (0.5,), 0.5


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(stream, clock, monkeypatch, verbose=1, slow=30.0):
    """Two epochs of four and two steps; the first takes 100 s, the others `slow`."""
    monkeypatch.setattr(sys, "stdout", stream)
    tuner = Tuner()
    line = progress.ProgressLine(tuner, 2, {0: 4, 1: 2}, verbose)
    line.on_train_begin()
    for epoch, steps in ((0, 4), (1, 2)):
        line.on_epoch_begin(epoch)
        for step in range(steps):
            line.on_train_batch_begin(step)
            clock[0] += 100.0 if (epoch, step) == (0, 0) else slow
            tuner.compiled_last, tuner.compiles_next = (epoch, step) == (0, 0), False
            tuner.batch_loss = 0.25 * (step + 1)
            line.on_train_batch_end(step, {"loss": 1.5})
        line.on_test_begin()
        line.on_epoch_end(epoch, {"loss": 1.5, "val_loss": 2.25})
    return stream.getvalue()


def test_a_file_gets_plain_lines(clock, monkeypatch):
    text = run(io.StringIO(), clock, monkeypatch)
    assert "\r" not in text and "\b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("Compiling the training step: the first step takes longer")
    assert lines[1] == "Epoch 1/2, step 1/4: loss 0.25, mean 1.5"  # no time that is left: it was compiling
    assert lines[2] == "Epoch 1/2, step 2/4: loss 0.5, mean 1.5, 30.00 s a step, 2 min left"  # four steps of 30 s
    assert "Epoch 1/2: loss 1.5, val_loss 2.25 (3 min)" in lines
    assert lines[-1] == "Epoch 2/2: loss 1.5, val_loss 2.25 (60 s)" and len([x for x in lines if "Compil" in x]) == 1


def test_a_file_is_not_filled_with_lines(clock, monkeypatch):
    text = run(io.StringIO(), clock, monkeypatch, slow=1.0)
    assert len(text.splitlines()) == 4  # compiling, the first step, two epochs


def test_a_terminal_gets_one_line_that_is_written_over(clock, monkeypatch):
    text = run(Terminal(), clock, monkeypatch)
    assert text.count("\n") == 3 and text.count("\r") == 6 + 2 + 2
    assert re.search(r"\rEpoch 1/2, step 4/4: loss 1, mean 1.5, 30.00 s a step, 60 s left", text)


def test_verbose_2_is_a_line_an_epoch(clock, monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        text = run(stream, clock, monkeypatch, verbose=2)
        assert "\r" not in text and len(text.splitlines()) == 3


@pytest.mark.slow
def test_fit_says_what_it_is_going_to_do_and_how_it_went(lines, capsys):
    tuner = small_tuner(accumulate=2)
    tuner.fit(lines, epochs=2)
    said = capsys.readouterr().out
    batches = len(tuner.batches(lines))
    assert said.startswith("Template: '{prompt}:{response}<eos>' (the dataset's own).\nTraining with ")
    steps = 2 * -(-batches // 2)
    assert f"17 lines, 2 epochs of {batches} batches that make {steps} steps; validation on 1 lines after each." in said
    assert "Compiling" in said and "Epoch 1/2: loss" in said and "val_loss" in said and "\r" not in said
    tuner.fit(lines, epochs=1, verbose=0)
    tuner.fit(*arrays(4)[:2], verbose=0)
    assert capsys.readouterr().out == ""
    tuner.fit(*arrays(4)[:2], batch_size=2, verbose=1)
    assert "Epoch 1/1: loss" in capsys.readouterr().out
