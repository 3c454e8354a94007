"""GGUF files: every number as llama.cpp takes it, the header, the tokenizer; adapters alone; the Modelfile.

`tests/parity/test_exports.py` runs such files in llama.cpp itself.
"""

import dataclasses
import json

import gguf
import numpy as np
import pytest
import sentencepiece

import gemma_lora as gl
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.templates import Template
from gemma_lora.exchange import destination
from gemma_lora.exchange.chat_templates import jinja_of, modelfile_of
from gemma_lora.exchange.gguf_model import query_factor
from gemma_lora.exchange.peft import slots
from gemma_lora.gemma.architectures import architecture_of
from gemma_lora.layers.places import PLACES
from gemma_lora.lora import lora_layers
from tests.exchange.small_models import small
from tests.exchange.test_huggingface import expected_matrices
from tests.gemma.test_gguf import MODEL, write_gguf

CHAT = Template.gemma_chat()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def contents(path):
    """`(fields, {tensor: (type, values)})` of a file, by the gguf library."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = (tensor.tensor_type.name, values.reshape([int(n) for n in reversed(tensor.shape)]))
    return fields, tensors


def gguf_matrices(model):
    """`{GGUF's name: merged matrix}`."""
    named = expected_matrices(model)
    return {
        f"blk.{slot.module.split('.')[2]}.{PLACES[slot.target].gguf}.weight": named[f"{slot.module}.weight"]
        for slot in slots(model)
    }


@pytest.fixture
def from_file(tmp_path):
    """A model that a GGUF file holds, wide enough for Q8_0's blocks, with a random adapter."""
    write_gguf(tmp_path / "base.gguf")
    model = gl.load_gemma(tmp_path / "base.gguf")
    gl.apply_lora(model, rank=3, alpha=5.0)
    rng = np.random.default_rng(0)
    for layer in lora_layers(model):
        layer.lora_b.assign(rng.normal(0, 0.3, layer.lora_b.shape))
    return model


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_what_is_written_is_read_again(from_file, kind, tmp_path):
    done = gl.export(from_file, tmp_path / "out.gguf", "gguf", kind, CHAT)
    fields, tensors = contents(done.path)
    expected = gguf_matrices(from_file)
    assert len(tensors) == 2 + 2 * 13 and len(expected) == 14
    step = {"F32": 2**-23, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254}[kind]
    error = update = 0.0
    for name, matrix in expected.items():
        stored, values = tensors[name]
        assert stored == kind
        scale = np.abs(matrix).reshape(len(matrix), -1, 32).max(axis=2).repeat(32, axis=1) if kind == "Q8_0" else matrix
        assert np.all(np.abs(values - matrix) <= 1.1 * step * np.abs(scale) + 1e-5)
        error += ((values - matrix) ** 2).sum()
    update = sum((np.asarray(layer.delta(), np.float64) ** 2).sum() for layer in lora_layers(from_file))
    assert done.rounding == pytest.approx((error / update) ** 0.5, rel=1e-2, abs=1e-5)
    assert (kind == "F32") == (done.notes == ())
    assert {tensors[name][0] for name in tensors if "norm" in name} == {"F32"}
    # The package's own reader: KerasHub's variables are the merged ones.
    again = gl.load_gemma(done.path)
    assert again.gemma_lora_template == CHAT
    for slot in slots(again):
        name = f"blk.{slot.module.split('.')[2]}.{PLACES[slot.target].gguf}.weight"
        from gemma_lora.layers.linear import kernel_matrix

        np.testing.assert_array_equal(np.asarray(kernel_matrix(slot.layer)).T, tensors[name][1])
    for ours, theirs in zip(again.backbone.transformer_layers, from_file.backbone.transformer_layers, strict=True):
        np.testing.assert_allclose(ours.attention.query_norm.scale, theirs.attention.query_norm.scale, atol=1e-6)
        np.testing.assert_allclose(ours.post_ffw_norm.scale, theirs.post_ffw_norm.scale, atol=1e-6)


def test_the_header_says_what_llama_cpp_asks(from_file, tmp_path):
    fields, _ = contents(gl.export(from_file, tmp_path / "my-model.gguf", "gguf", template=CHAT).path)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    expected = {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.name": "my-model",
        "general.file_type": gguf.LlamaFileType.MOSTLY_F16,
        "gemma3.block_count": 2,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 16,
        "gemma3.attention.value_length": 16,
        "gemma3.attention.sliding_window": 6,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
        "gemma3.feed_forward_length": 96,
        "gemma3.embedding_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eot_token_id": pieces.piece_to_id("<end_of_turn>"),
        "tokenizer.chat_template": jinja_of(CHAT),
    }
    assert {name: fields.get(name) for name in expected} == expected
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert len(kinds) == 340
    for name in ("<pad>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<mask>", "<unused0>"):
        assert kinds[name] == gguf.TokenType.CONTROL, name
    for name in ("  ", "   ", "\n\n", "<table>"):  # runs of spaces as spaces
        assert kinds[name] == gguf.TokenType.USER_DEFINED, name
    assert kinds["<0x0A>"] == gguf.TokenType.BYTE and kinds["▁bend"] == gguf.TokenType.NORMAL


@pytest.mark.parametrize("generation", [1, 2])
def test_older_gemmas(generation, tmp_path):
    model = small(generation, layers=4)
    fields, tensors = contents(gl.export(model, tmp_path / "out.gguf", "gguf", "F32").path)
    name = {1: "gemma", 2: "gemma2"}[generation]
    assert fields["general.architecture"] == name and fields[f"{name}.rope.freq_base"] == 1e4
    for tensor, matrix in gguf_matrices(model).items():
        np.testing.assert_allclose(tensors[tensor][1], matrix, atol=1e-5, err_msg=tensor)
    block = model.backbone.transformer_layers[1]
    norms = {"attn_norm": block.pre_attention_norm, "ffn_norm": block.pre_ffw_norm}
    if generation == 2:
        norms |= {"post_attention_norm": block.post_attention_norm, "post_ffw_norm": block.post_ffw_norm}
    assert len(tensors) == 2 + 4 * (7 + len(norms))
    for tensor, norm in norms.items():
        np.testing.assert_array_equal(tensors[f"blk.1.{tensor}.weight"][1], 1 + np.asarray(norm.scale))
    caps = [fields.get(f"{name}.{cap}") for cap in ("attn_logit_softcapping", "final_logit_softcapping")]
    assert caps == ([5.0, 3.0] if generation == 2 else [None, None])
    assert fields.get(f"{name}.attention.sliding_window") == (6 if generation == 2 else None)
    assert "gemma_lora.template" in fields and f"{name}.attention.sliding_window_pattern" not in fields


def test_llama_cpp_scales_the_27bs_attention_otherwise():
    """1/sqrt(width / heads) with 62 blocks of Gemma 3 and 46 of Gemma 2, else 1/sqrt(head size)."""
    architecture = dataclasses.replace(architecture_of(small(3, adapter=False).backbone), width=96)
    assert query_factor(architecture, 3) == 1.0
    large = dataclasses.replace(architecture, blocks=architecture.blocks * 31)
    assert query_factor(large, 3) == pytest.approx((96 / 4) ** 0.5 / 8**0.5)
    assert query_factor(dataclasses.replace(large, attention_scale=24**-0.5), 3) == 1.0
    assert query_factor(dataclasses.replace(large, blocks=architecture.blocks * 23), 2) != 1.0


def test_rows_without_a_piece_get_an_unused_token(tmp_path):
    from tests.conftest import tiny_gemma

    model = tiny_gemma(3, vocabulary_size=350)
    model.preprocessor = small(3, adapter=False).preprocessor
    fields, tensors = contents(gl.export(model, tmp_path / "out.gguf", "gguf").path)
    assert len(fields["tokenizer.ggml.tokens"]) == len(tensors["token_embd.weight"][1]) == 350
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD349]" and fields["tokenizer.ggml.token_type"][-1] == 5


def test_numbers_that_float16_does_not_hold_are_refused_and_the_old_file_stays(tmp_path):
    model = small(3)
    (tmp_path / "out.gguf").write_bytes(b"old")
    kernel = model.backbone.transformer_layers[1].ffw_linear.base._kernel
    kernel.assign(np.asarray(kernel) * 1e6)
    with pytest.raises(GemmaLoraError, match="blk.1.ffn_down.weight.*float16.*BF16"):
        gl.export(model, tmp_path / "out.gguf", "gguf", "F16")
    assert (tmp_path / "out.gguf").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# --- the adapter alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_the_adapters_product_is_the_update(rslora, kind, tmp_path):
    model = small(3, rslora=rslora)
    done = gl.export(model, tmp_path / "adapter.gguf", "gguf-lora", kind)
    fields, tensors = contents(done.path)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    alpha = fields["adapter.lora.alpha"]
    assert alpha == pytest.approx(5.0 * 3**0.5 if rslora else 5.0)  # what llama.cpp divides by the rank
    found = 0
    for slot in slots(model):
        name = f"blk.{slot.module.split('.')[2]}.{PLACES[slot.target].gguf}.weight"
        a, b = (tensors[f"{name}.lora_{letter}"][1] for letter in "ab")
        assert a.shape[0] == b.shape[1] == 3
        np.testing.assert_allclose(
            alpha / 3 * b @ a, np.asarray(slot.layer.delta()).T, atol=2e-3 if kind == "F16" else 1e-5
        )
        found += 2
    assert len(tensors) == found == 28


def test_what_no_gguf_adapter_holds_is_refused(tmp_path):
    with pytest.raises(GemmaLoraError, match="DoRA.*scales each output.*--format gguf"):
        gl.export(small(3, dora=True), tmp_path / "a.gguf", "gguf-lora")
    with pytest.raises(GemmaLoraError, match="no LoRA layers"):
        gl.export(small(3, adapter=False), tmp_path / "a.gguf", "gguf-lora")
    assert not list(tmp_path.iterdir())


# --- the Modelfile -----------------------------------------------------------------------------------------


def test_the_modelfile_has_the_template_and_its_stops(tmp_path):
    template = Template("Say {{x}}: {prompt}\n", " {response}<eos>", ("<eos>", 'END"'))
    done = gl.export(small(3), tmp_path / "my.gguf", "gguf", template=template)
    text = (tmp_path / "my.Modelfile").read_text()
    assert done.files == (tmp_path / "my.gguf", tmp_path / "my.Modelfile")
    assert "FROM ./my.gguf\n" in text
    body = 'Say {{ "{{" }}x{{ "}}" }}: {{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}\n{{ .Response }}<eos>\n'
    assert f'TEMPLATE """{body}"""\n' in text
    assert 'PARAMETER stop "<eos>"\nPARAMETER stop "END\\""\nPARAMETER temperature 0\n' in text
    assert any("ends before 'END\"'" in note for note in done.notes)
    gl.export(small(3), tmp_path / "alone.gguf", "gguf-lora", template=CHAT)
    text = (tmp_path / "alone.Modelfile").read_text()
    assert "\nFROM ./base.gguf\nADAPTER ./alone.gguf\n" in text
    assert 'PARAMETER stop "<end_of_turn>"' in text
    with pytest.raises(GemmaLoraError, match='"""'):
        modelfile_of(Template('"""{prompt}', "{response}"), "./x.gguf")


# --- places and types --------------------------------------------------------------------------------------


def test_a_type_of_llama_cpps_needs_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setattr(destination, "is_installed", lambda name: False)
    with pytest.raises(GemmaLoraError, match=r'Q4_K_M is made by llama.cpp.*pip install "gemma_lora\[serve\]".*Q8_0'):
        gl.export(small(3), tmp_path / "out.gguf", "gguf", "q4_k_m")
    assert not list(tmp_path.iterdir())


def test_the_ending_and_the_field_that_is_no_template(from_file, tmp_path):
    with pytest.raises(GemmaLoraError, match="a GGUF file ends in .gguf"):
        gl.export(from_file, tmp_path / "out.bin", "gguf")
    path = gl.export(from_file, tmp_path / "out.gguf", "gguf").path
    text = json.dumps(Template.base().to_dict()).encode()
    data = path.read_bytes()
    assert data.count(text) == 1
    path.write_bytes(data.replace(text, b"[" * len(text)))
    with pytest.raises(GemmaLoraError, match="out.gguf.*gemma_lora.template.*Export it again"):
        gl.load_gemma(path)
