"""A Hugging Face folder: every number, the configuration, the tokenizer and the chat template, without transformers.

`tests/parity/test_exports.py` loads such folders with transformers itself.
"""

import json
import random

import jinja2
import keras
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import tokenizers
from safetensors.numpy import load_file

import gemma_lora as gl
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.encoding import encode_prompt
from gemma_lora.data.templates import Template
from gemma_lora.exchange.chat_templates import jinja_of
from gemma_lora.exchange.merged import Part, Rounding
from gemma_lora.exchange.peft import slots
from gemma_lora.lora import lora_layers
from tests.conftest import tiny_gemma
from tests.exchange.small_models import small
from tests.gemma.test_gguf import MODEL

GENERATIONS = pytest.mark.parametrize("generation", [1, 2, 3], ids=["gemma1", "gemma2", "gemma3"])
TEMPLATES = {
    "base": Template.base(),
    "chat": Template.gemma_chat(),
    "own": Template("Ausgabe 'é' \\ {{x}}: {prompt}\nJSON:", " {response}<eos>"),
    "bos": Template("<bos>{prompt}\n\n", "{response}<end_of_turn>", ("<end_of_turn>", "###")),
}


def folder_json(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def expected_matrices(model):
    """`{transformers' name: base + scaling · A B}` from the layers' own variables, written out here."""
    found = {}
    for slot in slots(model):
        layer = slot.layer
        base = np.asarray(keras.ops.convert_to_tensor(layer.base._kernel), np.float64)
        if base.ndim == 3:  # attention's: (heads, width, size), and of the output (heads, size, width)
            output = slot.target == "attention_output"
            base = base.reshape(-1, base.shape[-1]) if output else base.transpose(1, 0, 2).reshape(base.shape[1], -1)
        whole = base + 5.0 / 3.0 * np.asarray(layer.lora_a, np.float64) @ np.asarray(layer.lora_b, np.float64)
        if layer.dora:
            whole *= np.asarray(layer.magnitude, np.float64) / np.sqrt((whole**2).sum(axis=0))
        found[f"{slot.module}.weight"] = whole.T
    return found


@GENERATIONS
@pytest.mark.parametrize("dora", [False, True])
def test_every_number_of_the_merged_model(generation, dora, tmp_path):
    model = small(generation, dora=dora)
    before = [np.asarray(variable) for variable in model.variables]
    done = gl.export(model, tmp_path / "out", "huggingface")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    matrices = expected_matrices(model)
    for name, expected in matrices.items():
        np.testing.assert_allclose(tensors[name], expected, atol=1e-5, err_msg=name)
    backbone = model.backbone
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], backbone.token_embedding.embeddings)
    np.testing.assert_array_equal(tensors["model.norm.weight"], backbone.layer_norm.scale)
    norms = {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "pre_ffw_norm"}
    if generation > 1:
        norms |= {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "pre_ffw_norm"}
        norms |= {"post_feedforward_layernorm": "post_ffw_norm"}
    if generation == 3:
        norms |= {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}
    for number, block in enumerate(backbone.transformer_layers):
        for name, path in norms.items():
            norm = block
            for attribute in path.split("."):
                norm = getattr(norm, attribute)
            np.testing.assert_array_equal(tensors[f"model.layers.{number}.{name}.weight"], norm.scale)
    assert len(tensors) == len(matrices) + 2 + 2 * len(norms)
    # The model is as it was, with its adapter beside it.
    assert not any(layer.merged for layer in lora_layers(model))
    assert all(np.array_equal(variable, was) for variable, was in zip(model.variables, before, strict=True))
    assert done.rounding == 0.0 and done.type == "F32" and all(path.is_file() for path in done.files)


@pytest.mark.parametrize("scheme", ["nf4", "int8", "int4"])
def test_a_packed_base_is_decoded_and_merged(scheme, tmp_path):
    model = small(3, base=scheme, dora=scheme == "nf4")
    gl.export(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, expected in expected_matrices(model).items():
        np.testing.assert_allclose(tensors[name], expected, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], model.backbone.token_embedding.embeddings)


def test_bfloat16_is_rounded_once_and_the_cost_is_told(tmp_path):
    model = small(3)
    exact = expected_matrices(model)
    done = gl.export(model, tmp_path / "out", type="bf16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    error = update = 0.0
    for slot in slots(model):
        name = f"{slot.module}.weight"
        assert tensors[name].dtype == ml_dtypes.bfloat16
        written = tensors[name].astype(np.float64)
        np.testing.assert_allclose(written, exact[name], rtol=2**-8, atol=1e-6)
        error += ((written - exact[name]) ** 2).sum()
        update += (np.asarray(slot.layer.delta(), np.float64) ** 2).sum()
    assert done.rounding == pytest.approx((error / update) ** 0.5, rel=1e-3)
    assert f"{done.rounding:.2%} of what the adapter changed" in done.notes[0]
    assert done.notes[0] in (tmp_path / "out" / "README.md").read_text()
    assert folder_json(tmp_path / "out", "config.json")["dtype"] == "bfloat16"


def test_a_merged_model_is_written_as_it_is_and_its_update_is_known(tmp_path):
    model = small(3)
    apart = gl.export(model, tmp_path / "apart", type="BF16")
    gl.merge_lora(model)
    merged = gl.export(model, tmp_path / "merged", type="BF16")
    one, other = (load_file(done.path / "model.safetensors") for done in (apart, merged))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert merged.rounding == pytest.approx(apart.rounding, rel=1e-3)


@GENERATIONS
def test_the_configuration_says_what_the_architecture_is(generation, tmp_path):
    gl.export(small(generation, adapter=False, layers=6), tmp_path / "out")
    config = folder_json(tmp_path / "out", "config.json")
    common = {"vocab_size": 340, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "head_dim": 8}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "eos_token_id": 1}
    assert {name: config[name] for name in common} == common
    windows = [kind == "sliding_attention" for kind in config.get("layer_types", [])]
    assert windows == {1: [], 2: [True, False] * 3, 3: [True] * 5 + [False]}[generation]
    if generation > 1:
        assert (config["sliding_window"], config["query_pre_attn_scalar"]) == (6, 8)
        caps = (config["attn_logit_softcapping"], config["final_logit_softcapping"])
        assert caps == ((5.0, 3.0) if generation == 2 else (None, None))
    assert (config["rope_theta"], config.get("rope_local_base_freq")) == (
        (1e6, 1e4) if generation == 3 else (1e4, None)
    )


def test_the_tokenizer_gives_sentencepieces_ids(tmp_path):
    gl.export(small(3), tmp_path / "out")
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    rng = random.Random(0)
    signs = ["a", "b", "bend", " ", "  ", "\n", "\n\n", "\t", "<table>", "<", "é", "日", "🎉", "river", "▁", "<eos"]
    texts = ["".join(rng.choices(signs, k=30)) for _ in range(200)] + ["", " ", "  two  spaces\n\tand a tab "]
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
    assert ours.encode("a").ids == [2, *theirs.encode("a")]
    turn = theirs.piece_to_id("<start_of_turn>")
    assert ours.encode("<eos><start_of_turn>", add_special_tokens=False).ids == [1, turn]
    assert ours.decode(ours.encode("the river  bends🎉\n", add_special_tokens=False).ids) == "the river  bends🎉\n"
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == MODEL


def test_pieces_without_a_row_are_left_out_or_refused(tmp_path):
    model = tiny_gemma(3, vocabulary_size=339)  # the last piece is an ordinary character
    model.preprocessor = small(3).preprocessor
    with pytest.raises(GemmaLoraError, match="340 pieces, the embedding 339 rows"):
        gl.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the chat template -------------------------------------------------------------------------------------

CHATS = [
    [{"role": "user", "content": "  12 lug  2024 \n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the river"}],
    [
        {"role": "user", "content": "a bend"},
        {"role": "assistant", "content": " of the river "},
        {"role": "user", "content": "and 'then' \\n {{ x }}?"},
    ],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS, ids=["one", "system", "three"])
@pytest.mark.parametrize("trims", [False, True])
def test_the_chat_template_gives_the_tokens_of_training(name, chat, trims, tmp_path):
    """Rendered as transformers and llama.cpp do, then encoded by the exported tokenizer."""
    model, template = small(3), TEMPLATES[name]
    gl.export(model, tmp_path / "out", template=template)
    environment = jinja2.Environment(trim_blocks=trims, lstrip_blocks=trims)
    text = (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8")
    rendered = environment.from_string(text).render(messages=chat, bos_token="<bos>", add_generation_prompt=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = tokenizer.encode(rendered, add_special_tokens=False).ids
    assert ids == encode_prompt(chat, model.preprocessor.tokenizer, template).tolist()
    assert folder_json(tmp_path / "out", "tokenizer_config.json")["chat_template"] == text


def test_a_chat_that_does_not_alternate_is_refused():
    def refuse(message):
        raise ValueError(message)

    template = jinja2.Template(jinja_of(Template.base()))
    for roles in (["user", "user"], ["assistant"], ["user", "system"], ["user", "tool"]):
        with pytest.raises(ValueError, match="user and assistant in turns"):
            chat = [{"role": role, "content": "x"} for role in roles]
            template.render(messages=chat, bos_token="", raise_exception=refuse)


def test_the_stop_tokens_are_the_templates(tmp_path):
    model = small(3)
    turn = sentencepiece.SentencePieceProcessor(model_proto=MODEL).piece_to_id("<end_of_turn>")
    for name, ids in {"base": [1], "chat": [1, turn], "bos": [1, turn]}.items():
        gl.export(model, tmp_path / name, template=TEMPLATES[name])
        assert folder_json(tmp_path / name, "generation_config.json")["eos_token_id"] == ids
    card = (tmp_path / "bos" / "README.md").read_text()
    assert 'before the text "###"' in card  # which no token is


# --- the card ----------------------------------------------------------------------------------------------


def test_the_card_tells_of_the_run(tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    scores = {"exact match": {"value": 0.9, "low": 0.8, "high": 0.95}}
    metrics = {"after": {"test": {"scores": scores, "count": 200}}, "before": {"test": {"exact_match": 0.078}}}
    metrics |= {"english_perplexity": {"before": 39.7, "after": 52.8}, "warnings": ["Only 14 training steps."]}
    (run / "metrics.json").write_text(json.dumps(metrics))
    settings = {"data": "my lines", "data_sha256": "abc123", "rank": 16, "epochs": None, "chosen": {"epochs": 3}}
    (run / "settings.json").write_text(json.dumps(settings))
    model = small(3)
    model.gemma_lora_source = "gemma3-270m"
    gl.export(model, tmp_path / "expenses", adapter=run / "adapter")
    card = (tmp_path / "expenses" / "README.md").read_text()
    assert card.startswith("---\nbase_model: google/gemma-3-270m\nlicense: gemma\n")
    for text in (
        *("# expenses", "`my lines` (SHA-256 abc123)", "- epochs: 3", "| test | 200 | exact match | 7.8 % | 90.0 % |"),
        *("| perplexity | 39.7 | 52.8 |", "- Only 14 training steps.", "Q4_K_M file decoded", "Gemma Terms of Use"),
    ):
        assert text in card
    assert "Gemma Terms of Use" in (tmp_path / "expenses" / "NOTICE").read_text()


def test_without_a_run_or_an_adapter_the_card_says_so(tmp_path):
    gl.export(small(3, adapter=False), tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert (
        "without an adapter" in card and "Nothing is recorded about the lines" in card and "None are recorded" in card
    )


# --- what is refused ---------------------------------------------------------------------------------------


def keras_lora(model):
    model.backbone.transformer_layers[0].gating_ffw.enable_lora(2)


def keras_int8(model):
    model.backbone.transformer_layers[0].attention.query_dense.quantize("int8")


def embedding_lora(model):
    model.backbone.token_embedding.enable_lora(2)


@pytest.mark.parametrize("spoil", [keras_lora, keras_int8, embedding_lora, lambda model: gl.apply_adapters(model, 2)])
def test_what_no_single_matrix_holds_is_refused_before_anything_is_written(spoil, tmp_path):
    model = small(3, adapter=False)
    spoil(model)
    with pytest.raises(
        GemmaLoraError, match="Block 0's (gate|query|attention_output) is a|token_embedding. has Keras's"
    ):
        gl.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bad_arguments_and_places(tmp_path):
    model = small(3)
    with pytest.raises(ValueError, match="`format` must be one of huggingface, gguf, gguf-lora"):
        gl.export(model, tmp_path, "onnx")
    with pytest.raises(ValueError, match="`type` of the format huggingface must be one of F32, BF16"):
        gl.export(model, tmp_path, type="F16")
    (tmp_path / "file").write_text("")
    with pytest.raises(GemmaLoraError, match="is a file. Give a folder"):
        gl.export(model, tmp_path / "file")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(GemmaLoraError, match="holds an adapter"):
        gl.export(model, tmp_path)
    model.preprocessor = None
    with pytest.raises(GemmaLoraError, match="no SentencePiece tokenizer"):
        gl.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_sentence_on_rounding_warns_where_more_is_lost_than_learned():
    ones, rounding = np.ones((2, 2), "float32"), Rounding()
    rounding.add(Part("query", 0, (2, 2), lambda: ones, True, lambda: 4.0), ones, ones + 0.5)
    assert (rounding.share_of_update, rounding.share_of_weights) == (0.5, 0.5)
    assert rounding.sentence("Q4_0") == (
        "Rounding the merged weights to Q4_0 moves them by 50.00% of what the adapter changed (50.00% of the weights)."
    )
    rounding.add(Part("key", 0, (2, 2), lambda: ones, True, lambda: 0.0), ones, ones + 2)
    assert rounding.sentence("Q4_0").endswith("More is lost than was learned: take more bits.")
    rounding.add(Part("up", 0, (2, 2), lambda: ones, True, lambda: None), ones, ones)  # a merged DoRA
    assert rounding.share_of_update is None and rounding.sentence("Q4_0") == ""
