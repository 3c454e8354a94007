"""An adapter names the base it was trained on, keeps that name, and says so where it meets another base."""

import hashlib
import json
import warnings

import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.exchange.adapter_card import card
from gemma_lora.exchange.peft import load_adapter, save_adapter
from gemma_lora.gemma.load import BUILTIN_SHA256
from gemma_lora.gemma.origin import Origin, hub_name, origin_of, record_origin
from tests.conftest import tiny_gemma

Q4 = Origin("google/gemma-3-270m", "ab" * 32, "Q4_K_M")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("gemma3-270m", "google/gemma-3-270m"),
        ("gemma3_270m", "google/gemma-3-270m"),
        ("gemma3_instruct_270m", "google/gemma-3-270m-it"),
        ("gemma3_1b", "google/gemma-3-1b-pt"),
        ("gemma3_instruct_4b_text", "google/gemma-3-4b-it"),
        ("gemma2_2b_en", "google/gemma-2-2b"),
        ("gemma2_instruct_9b_en", "google/gemma-2-9b-it"),
        ("gemma_2b_en", "google/gemma-2b"),
        ("gemma_1.1_instruct_7b_en", "google/gemma-1.1-7b-it"),
        ("kaggle://keras/gemma3/keras/gemma3_instruct_1b/3", "google/gemma-3-1b-it"),
        ("hf://me/mine", "me/mine"),
        ("medgemma_4b", "medgemma_4b"),
        ("presets/mine", "presets/mine"),
        ("files/mine.gguf", "mine.gguf"),
    ],
)
def test_names_for_other_tools(source, name):
    assert hub_name(source) == name


def test_a_gguf_file_may_say_what_it_was_made_of():
    fields = {"general.base_model.0.repo_url": "https://huggingface.co/google/gemma-3-1b-it"}
    assert hub_name("x.gguf", fields) == "google/gemma-3-1b-it"
    assert hub_name("x.gguf", {"general.base_model.0.repo_url": "see our site"}) == "x.gguf"


SAME = [
    (Origin("google/gemma-3-270m"), Origin("Google/gemma-3-270m")),
    (Origin("/models/gemma-3-270m/"), Origin("google/gemma-3-270m")),
    (Origin("google/gemma-3-270m"), Q4),  # PEFT names no file
    (Q4, Q4),
    (Q4, Origin()),
    (Origin(), Q4),
]
OTHER = [
    (Origin("google/gemma-3-270m"), Origin("google/gemma-3-270m-it")),
    (Origin("unsloth/gemma-3-270m"), Origin("google/gemma-3-270m")),
    (Q4, Origin("google/gemma-3-270m")),
    (Q4, Origin("google/gemma-3-270m", "cd" * 32, "Q4_K_M")),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_bases_that_may_be_the_same(one, other):
    assert one.differs_from(other) is None


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_bases_that_differ(one, other):
    assert str(other) in one.differs_from(other)


def test_a_files_digest_is_of_what_was_read(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"weights")
    model = tiny_gemma()
    assert origin_of(model) == Origin()
    record_origin(model, str(file), file, {"general.file_type": 15})
    assert origin_of(model) == Origin("x.gguf", hashlib.sha256(b"weights").hexdigest(), "Q4_K_M")
    changed = tmp_path / "y.gguf"
    changed.write_bytes(b"weights")
    record_origin(model, str(changed), changed, {"general.file_type": 15})
    changed.write_bytes(b"others")
    assert origin_of(model) == Origin("y.gguf", None, "Q4_K_M")


def trained(model):
    lora.apply_lora(model, rank=2, targets="query")
    for layer in lora.lora_layers(model):
        layer.lora_b.assign(np.full(layer.lora_b.shape, 0.1))
    return model


def named(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.slow
def test_the_base_is_named_and_its_name_kept(tmp_path):
    source = trained(tiny_gemma())
    save_adapter(source, tmp_path / "unknown")
    assert named(tmp_path / "unknown") is None
    record_origin(source, "hf://me/mine")
    save_adapter(source, tmp_path / "mine")
    assert named(tmp_path / "mine") == "me/mine"
    target = load_adapter(tiny_gemma(), tmp_path / "mine")  # a model that does not say where it is from
    save_adapter(target, tmp_path / "again")
    assert named(tmp_path / "again") == "me/mine"
    lora.detach_lora(target)
    save_adapter(trained(target), tmp_path / "new")
    assert named(tmp_path / "new") is None
    save_adapter(source, tmp_path / "said", base_model="other/name")
    assert named(tmp_path / "said") == "other/name"


@pytest.mark.slow
def test_loading_on_another_base_warns_and_keeps_the_name(tmp_path):
    source = trained(tiny_gemma())
    record_origin(source, "gemma3_instruct_1b")
    save_adapter(source, tmp_path / "it")
    target = tiny_gemma()
    record_origin(target, "gemma3_1b")
    with pytest.warns(UserWarning, match="google/gemma-3-1b-it is not google/gemma-3-1b-pt"):
        load_adapter(target, tmp_path / "it")
    save_adapter(target, tmp_path / "again")
    assert named(tmp_path / "again") == "google/gemma-3-1b-it"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(source, tmp_path / "it")


@pytest.mark.slow
def test_training_goes_on_on_the_base_it_is_on(tmp_path):
    from gemma_lora.training.tuner import FineTuner

    source = trained(tiny_gemma())
    record_origin(source, "gemma3_instruct_1b")
    save_adapter(source, tmp_path / "it")
    target = tiny_gemma()
    record_origin(target, "gemma3_1b")
    with pytest.warns(UserWarning):
        load_adapter(target, tmp_path / "it")
    tuner = FineTuner(target)
    tuner.compile("sgd")
    ids = np.arange(12)[None] + 5
    tuner.fit({"token_ids": ids, "padding_mask": np.ones_like(ids)}, ids, sample_weight=np.ones_like(ids), verbose=0)
    save_adapter(target, tmp_path / "on")
    assert named(tmp_path / "on") == "google/gemma-3-1b-pt"


@pytest.mark.real
def test_the_built_in_file_is_named(tmp_path, real_gemma):
    assert origin_of(real_gemma) == Origin("google/gemma-3-270m", BUILTIN_SHA256, "Q4_K_M")
    lora.apply_lora(real_gemma, rank=1, targets="query")
    try:
        save_adapter(real_gemma, tmp_path)
    finally:
        lora.detach_lora(real_gemma)
    assert named(tmp_path) == "google/gemma-3-270m"
    assert json.loads((tmp_path / "base.json").read_text()) == {"gguf_sha256": BUILTIN_SHA256, "gguf_type": "Q4_K_M"}
    text = (tmp_path / "README.md").read_text()
    assert f"Q4_K_M GGUF file with SHA-256 `{BUILTIN_SHA256}`, decoded to floats" in text


CONFIG = {"r": 2, "rank_pattern": {"q_proj": 8}, "use_dora": True, "use_rslora": True}


def test_a_card_says_what_the_base_was():
    text = card(Q4, CONFIG)
    assert text.startswith("---\nlibrary_name: peft\nbase_model: google/gemma-3-270m\n")
    assert "DoRA, rank-stabilized of rank 2, 8" in text and "that file's rounding" in text
    assert "rounding" not in card(Origin("x", "ab" * 32, "BF16"), CONFIG)
    assert "GGUF" not in card(Origin("me/mine"), CONFIG)
    assert "base_model" not in card(Origin(), CONFIG)


@pytest.mark.slow
def test_a_card_of_somebody_elses_is_left_alone(tmp_path):
    model = trained(tiny_gemma())
    save_adapter(model, tmp_path)
    record_origin(model, "hf://me/mine")
    save_adapter(model, tmp_path)
    assert "me/mine" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("Mine.")
    save_adapter(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."
