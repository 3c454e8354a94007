"""GGUF files: what was written comes out, in KerasHub's shapes; what is malformed is refused with file and remedy."""

import dataclasses
import io
import os
import types
from pathlib import Path

import gguf as gguf_library
import numpy as np
import pytest
import sentencepiece

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.gemma import gguf
from gemma_lora.gemma.load import load_gemma

HIDDEN, HEADS, KEY_HEADS, HEAD, WIDTH, LAYERS = 64, 4, 2, 16, 96, 2
F16, Q8_0 = gguf_library.GGMLQuantizationType.F16, gguf_library.GGMLQuantizationType.Q8_0
TEXTS = ["a bend of the river, and the river bends", "  two  spaces\n\tand a tab ", "l'été à Zürich", "日本 🎉", ""]
#: Pieces that come before all merging, as in Gemma: runs of spaces and of line ends, and names.
NAMED = ["▁▁", "▁▁▁", "\n\n", "\t", "<table>"]
#: Pieces of the same kind that llama.cpp's converter calls control tokens.
TURNS = ["<start_of_turn>", "<end_of_turn>", "<mask>", "<unused0>"]
#: Tensors that are not stored as F32, one of each kind at least.
KINDS = {"token_embd": Q8_0, "attn_q": F16, "attn_v": Q8_0, "attn_output": Q8_0, "ffn_gate": F16, "ffn_down": Q8_0}


def sentencepiece_model() -> bytes:
    """A small SentencePiece model with Gemma's settings, trained by the sentencepiece library."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{text} and over the bend again" for text in TEXTS[:3]] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>"},
        **{"eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"},
        user_defined_symbols=NAMED + TURNS,
        minloglevel=2,
    )
    return model.getvalue()


def arrays(vocabulary: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under llama.cpp's names and in its shapes: a matrix is (d_out, d_in)."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (vocabulary, HIDDEN), "output_norm": (HIDDEN,)}
    block = {
        **dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (HIDDEN,)),
        **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (HEAD,)),
        "attn_q": (HEADS * HEAD, HIDDEN),
        **dict.fromkeys(("attn_k", "attn_v"), (KEY_HEADS * HEAD, HIDDEN)),
        "attn_output": (HIDDEN, HEADS * HEAD),
        **dict.fromkeys(("ffn_gate", "ffn_up"), (WIDTH, HIDDEN)),
        "ffn_down": (HIDDEN, WIDTH),
    }
    shapes |= {f"blk.{n}.{name}": shape for n in range(LAYERS) for name, shape in block.items()}
    return {f"{name}.weight": rng.normal(0.3, 0.5, shape).astype("float32") for name, shape in shapes.items()}


FIELDS = {
    "block_count": LAYERS,
    "embedding_length": HIDDEN,
    "feed_forward_length": WIDTH,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KEY_HEADS,
    "attention.key_length": HEAD,
    "attention.sliding_window": 6,
}


def write_gguf(
    path: Path,
    seed: int = 0,
    architecture="gemma3",
    fields=FIELDS,
    drop=(),
    tokenizer=True,
    split=1,
    more=None,
    rows=None,
):
    """Writes a tiny Gemma 3 as llama.cpp's converter would; returns the weights as stored, in float32.

    `more(writer)` adds what it likes; `rows` is the embedding's height where it is not that of the tokenizer.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    size = pieces.get_piece_size()
    writer = gguf_library.GGUFWriter(path, architecture)
    for name, value in fields.items():
        writer.add_uint32(f"gemma3.{name}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    if more:
        more(writer)
    if split > 1:
        writer.add_uint16("split.count", split)
    if tokenizer:
        writer.add_tokenizer_model("llama")
        # llama.cpp's converter writes the spaces of user-defined pieces as spaces, all others' as ▁.
        names = [pieces.id_to_piece(i) for i in range(size)]
        writer.add_token_list([name.replace("▁", " ") if name in NAMED else name for name in names])
        writer.add_token_scores([pieces.get_score(i) for i in range(size)])
        writer.add_token_types([kind_of(pieces, i) for i in range(size)])
        for name, number in {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    stored = {}
    for name, array in arrays(rows or size, seed).items():
        if name in drop:
            continue
        kind = KINDS.get(name.removesuffix(".weight").split(".")[-1])
        if kind is None:
            writer.add_tensor(name, array)
            stored[name] = array
        else:
            raw = gguf_library.quantize(array, kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
            stored[name] = gguf_library.dequantize(raw, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def kind_of(pieces, i: int) -> int:
    if pieces.is_byte(i):
        return gguf_library.TokenType.BYTE
    # Gemma's files call <unk> a control token, too.
    if pieces.is_control(i) or pieces.is_unknown(i) or pieces.id_to_piece(i) in TURNS:
        return gguf_library.TokenType.CONTROL
    named = pieces.id_to_piece(i) in NAMED
    return gguf_library.TokenType.USER_DEFINED if named else gguf_library.TokenType.NORMAL


kind_of_piece = kind_of
MODEL = sentencepiece_model()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gemma_lora" / "gguf"


@pytest.fixture
def file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


# --- what was written comes out ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    stored = write_gguf(folder / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return load_gemma(folder / "tiny.gguf"), stored


def test_the_model_says_whether_it_is_instruction_tuned(loaded, file, monkeypatch):
    """By the file's name or fields; the default template follows."""
    assert loaded[0].gemma_lora_instruction_tuned is False
    file.rename(file.with_name("tiny-it.gguf"))
    assert load_gemma(file.with_name("tiny-it.gguf")).gemma_lora_instruction_tuned is True
    asked = {}
    monkeypatch.setattr("gemma_lora.gemma.load.is_instruction_tuned", lambda source, fields: asked.update(fields))
    load_gemma(file.with_name("tiny-it.gguf"))
    assert asked["general.architecture"] == "gemma3"


def test_rows_in_8_bits_are_the_files_own_or_have_a_scale_each(file):
    index = gguf.read_index(file)
    table = gguf.read_int8_rows(index, "token_embd.weight")  # Q8_0: nothing is rounded again
    np.testing.assert_array_equal(table.decode(), gguf.read_tensor(index, "token_embd.weight"))
    assert table.scales.shape == (table.shape[0], HIDDEN // 32)
    for rows_at_once in (7, 8192):
        rows = gguf.read_int8_rows(index, "blk.0.attn_q.weight", rows_at_once)  # F16
        right = gguf.read_tensor(index, "blk.0.attn_q.weight")
        assert rows.scales.shape == (len(right), 1)
        assert np.all(np.abs(np.asarray(rows.decode()) - right) <= rows.scales / 2 + 1e-7)
        np.testing.assert_array_equal(rows.scales[:, 0], np.abs(right).max(axis=1) / np.float32(127))


def test_every_tensor_comes_out_as_stored(file):
    index = gguf.read_index(file)
    stored = write_gguf(file.with_name("same.gguf"))
    assert set(index.tensors) == set(stored)
    assert {tensor.kind for tensor in index.tensors.values()} == {"F32", "F16", "Q8_0"}
    for name, array in stored.items():
        read = gguf.read_tensor(index, name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, array, err_msg=name)


def test_the_configuration_is_the_files(file):
    config = gguf.backbone_config(gguf.read_index(file))
    expected = {
        "num_layers": LAYERS,
        "hidden_dim": HIDDEN,
        "intermediate_dim": WIDTH,
        "num_query_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD,
        "sliding_window_size": 6,
        "vocabulary_size": 340,
        "global_rope_scaling_factor": 1.0,
        "final_logit_soft_cap": None,
    }
    assert {name: config[name] for name in expected} == expected
    assert config["layer_norm_epsilon"] == pytest.approx(1e-6)


@pytest.mark.parametrize("number", range(LAYERS))
def test_linear_layers_compute_the_files_matrix_products(loaded, number):
    """In the file y = W x with heads stacked in the rows of W, as in transformers."""
    model, stored = loaded
    block = model.backbone.transformer_layers[number]
    rng = np.random.default_rng(number)

    def product(name, x):
        return x @ stored[f"blk.{number}.{name}.weight"].T

    x = rng.normal(size=(1, 3, HIDDEN)).astype("float32")
    for name, layer in {"q": "query_dense", "k": "key_dense", "v": "value_dense"}.items():
        y = np.asarray(getattr(block.attention, layer)(x))
        np.testing.assert_allclose(y.reshape(1, 3, -1), product(f"attn_{name}", x), atol=1e-4, err_msg=name)
    heads = rng.normal(size=(1, 3, HEADS, HEAD)).astype("float32")
    y = block.attention.output_dense(heads)
    np.testing.assert_allclose(y, product("attn_output", heads.reshape(1, 3, -1)), atol=1e-4)
    np.testing.assert_allclose(block.gating_ffw(x), product("ffn_gate", x), atol=1e-4)
    np.testing.assert_allclose(block.gating_ffw_2(x), product("ffn_up", x), atol=1e-4)
    wide = rng.normal(size=(1, 3, WIDTH)).astype("float32")
    np.testing.assert_allclose(block.ffw_linear(wide), product("ffn_down", wide), atol=1e-4)


def test_norms_multiply_by_what_the_file_holds(loaded):
    model, stored = loaded
    rng = np.random.default_rng(0)
    layers = {"output_norm": model.backbone.layer_norm}
    for number, block in enumerate(model.backbone.transformer_layers):
        layers |= {
            f"blk.{number}.attn_norm": block.pre_attention_norm,
            f"blk.{number}.post_attention_norm": block.post_attention_norm,
            f"blk.{number}.ffn_norm": block.pre_ffw_norm,
            f"blk.{number}.post_ffw_norm": block.post_ffw_norm,
            f"blk.{number}.attn_q_norm": block.attention.query_norm,
            f"blk.{number}.attn_k_norm": block.attention.key_norm,
        }
    for name, layer in layers.items():
        weight = stored[f"{name}.weight"]
        x = rng.normal(size=(2, len(weight))).astype("float32")
        expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * weight
        np.testing.assert_allclose(layer(x), expected, atol=1e-5, err_msg=name)


def test_no_variable_is_left_out(loaded):
    model, stored = loaded
    variables = list(model.backbone.variables)
    assert len(variables) == len(stored)
    assert sum(np.prod(v.shape) for v in variables) == sum(array.size for array in stored.values())
    np.testing.assert_array_equal(model.backbone.token_embedding.embeddings, stored["token_embd.weight"])


def test_the_tokenizer_is_the_one_the_file_was_made_from(loaded):
    original = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    tokenizer = loaded[0].preprocessor.tokenizer
    for text in [
        *TEXTS,
        "a  b   c    d\n\n\n  river",
        "<table>  <bos><table>",
        "<start_of_turn>a<end_of_turn>\n<mask><unused0><eos>",
    ]:
        assert np.asarray(tokenizer.tokenize(text)).tolist() == original.encode(text), text
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<eos>", "<bos>", "<unk>")] == [0, 1, 2, 3]


def test_the_27bs_attention_scale_is_folded_into_the_query_norm(file):
    """llama.cpp: 27B (62 blocks) scales by 1/sqrt(width / heads), all others by 1/sqrt(head size)."""
    index = gguf.read_index(file)
    block = types.SimpleNamespace(num_query_heads=HEADS, head_dim=HEAD)
    large = dataclasses.replace(index, fields=index.fields | {"gemma3.block_count": 62, "gemma3.embedding_length": 96})
    name = "blk.0.attn_q_norm.weight"
    plain = 1 + gguf._query_norm(index, name, block)
    folded = 1 + gguf._query_norm(large, name, block)
    np.testing.assert_allclose(folded / np.sqrt(HEAD), plain / np.sqrt(96 / HEADS), rtol=1e-5)


def test_capital_letters_in_the_ending(file):
    file.rename(file.with_name("TINY.GGUF"))
    assert load_gemma(file.with_name("TINY.GGUF")).backbone.hidden_dim == HIDDEN


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"rope.scaling.factor": 8.0}, 8.0),
        ({"rope.scaling.factor": 8.0, "rope.scaling.type": "linear"}, 8.0),
        ({"rope.scaling.factor": 8.0, "rope.scaling.type": "none"}, 1.0),
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 0.0}, 1.0),
    ],
)
def test_linear_scaling_is_used_as_llama_cpp_does(file, fields, factor):
    def more(writer):
        for name, value in fields.items():
            (writer.add_string if isinstance(value, str) else writer.add_float32)(f"gemma3.{name}", value)

    rewrite(file, more=more)
    assert gguf.backbone_config(gguf.read_index(file))["global_rope_scaling_factor"] == factor


def test_an_output_that_is_the_embedding_again_is_used(file):
    raw = gguf_library.quantize(arrays(340)["token_embd.weight"], Q8_0)
    rewrite(file, more=lambda writer: writer.add_tensor("output.weight", raw, raw_dtype=Q8_0))
    assert load_gemma(file).backbone.hidden_dim == HIDDEN


def test_a_token_without_a_row_is_left_out_if_it_is_no_text(file, monkeypatch):
    """Gemma 3's tokenizer has a token for pictures, the text models' embedding no row for it."""
    monkeypatch.setattr("tests.gemma.test_gguf.kind_of", lambda pieces, i: 3 if i == 339 else kind_of_piece(pieces, i))
    rewrite(file, rows=339)
    index = gguf.read_index(file)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=index.tokenizer)
    assert pieces.get_piece_size() == gguf.backbone_config(index)["vocabulary_size"] == 339


# --- malformed files ---------------------------------------------------------------------------------------


def rewrite(path, **named):
    path.unlink()
    write_gguf(path, **named)


def overwrite(path, at, raw):
    data = bytearray(path.read_bytes())
    data[at : at + len(raw)] = raw
    path.write_bytes(data)


def truncate(path, share):
    os.truncate(path, int(path.stat().st_size * share))


def without(name):
    return {key: value for key, value in FIELDS.items() if key != name}


SPOILERS = {
    "missing": (lambda p: p.unlink(), "no such file.*Give the path"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "no such file.*Give the path"),
    "empty": (lambda p: p.write_bytes(b""), "not a GGUF file.*Download it again"),
    "no GGUF": (lambda p: p.write_bytes(b"PK\x03\x04 a zip"), "not a GGUF file.*Download it again"),
    "magic only": (lambda p: p.write_bytes(b"GGUF"), "cut short.*again"),
    "version 1": (lambda p: overwrite(p, 4, b"\1\0\0\0"), "version.*Convert"),
    "version 99": (lambda p: overwrite(p, 4, b"\x63\0\0\0"), "version.*Convert"),
    "big-endian": (lambda p: overwrite(p, 4, b"\0\0\0\3"), "version.*Convert"),
    "cut in the counts": (lambda p: os.truncate(p, 20), "cut short.*Download it again"),
    "cut in the header": (lambda p: os.truncate(p, 3000), "cut short.*Download it again"),
    "cut in the tensors": (lambda p: truncate(p, 0.6), "cut short.*Download it again"),
    "cut in the last tensor": (lambda p: os.truncate(p, p.stat().st_size - 200), "cut short.*Download it again"),
    "foreign": (lambda p: rewrite(p, architecture="llama"), "'llama'.*KerasHub preset or hf://"),
    "split": (lambda p: rewrite(p, split=2), "split.*llama-gguf-split --merge"),
    "no tokenizer": (lambda p: rewrite(p, tokenizer=False), "tokenizer.*Convert"),
    "no block count": (lambda p: rewrite(p, fields=without("block_count")), "gemma3.block_count.*convert"),
    "fewer heads": (lambda p: rewrite(p, fields=FIELDS | {"attention.head_count": 2}), "shape.*Convert"),
    "odd heads": (lambda p: rewrite(p, fields=FIELDS | {"attention.head_count": 6}), "shape.*Convert"),
    "wider": (lambda p: rewrite(p, fields=FIELDS | {"feed_forward_length": 100}), "shape.*Convert"),
    "no norm": (lambda p: rewrite(p, drop=("output_norm.weight",)), "output_norm.weight.*missing.*Convert"),
    "no matrix": (lambda p: rewrite(p, drop=("blk.1.ffn_up.weight",)), "blk.1.ffn_up.weight.*missing.*Convert"),
    "no embedding": (lambda p: rewrite(p, drop=("token_embd.weight",)), "token_embd.weight.*missing.*Convert"),
}


def constant(name, value, add="add_float32"):
    """A file with one more field of `gemma3.`, or another value of it."""

    def more(writer):
        for shard in writer.kv_data:
            shard.pop(f"gemma3.{name}", None)
        if value is not None:
            getattr(writer, add)(f"gemma3.{name}", value)

    return lambda path: rewrite(path, more=more)


def tensor(name, shape=(4, 32)):
    """A file with one more tensor."""
    array = np.random.default_rng(5).normal(size=shape).astype("float32")
    return lambda path: rewrite(path, more=lambda writer: writer.add_tensor(name, array))


def only(*fields):
    """A file that holds these text fields, a number and a tensor, and neither model nor tokenizer."""

    def spoil(path):
        path.unlink()
        writer = gguf_library.GGUFWriter(path, "gemma3")
        for shard in writer.kv_data:
            shard.clear()
        for name, value in fields:
            (writer.add_string if isinstance(value, str) else writer.add_uint16)(name, value)
        name = "blk.0.attn_q.weight.lora_a" if ("general.type", "adapter") in fields else "blk.1.ffn_up.weight"
        writer.add_tensor(name, np.zeros((4, 32), "float32"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return spoil


def of_type(number):
    """A file whose first tensor in Q8_0 says that it is of another of ggml's types."""

    def spoil(path):
        data, name = bytearray(path.read_bytes()), b"token_embd.weight"
        at = data.index(name, data.index(b"tokenizer.ggml.padding_token_id")) + len(name) + 4 + 2 * 8
        assert data[at] == Q8_0
        data[at : at + 4] = number.to_bytes(4, "little")
        path.write_bytes(data)

    return spoil


LATER_PART = (("split.no", 1), ("split.count", 3))
SPOILERS |= {
    "an output of its own": (
        tensor("output.weight", (340, HIDDEN)),
        "output.weight is another matrix.*lm_head is tied",
    ),
    "a narrow output": (tensor("output.weight", (340, 32)), "output.weight is another matrix.*lm_head is tied"),
    "a bias": (tensor("blk.0.attn_q.bias", (64,)), "blk.0.attn_q.bias.*does not have.*Convert the original"),
    "another wavelength": (constant("rope.freq_base", 5e5), "rope.freq_base is 500000.0.*1000000.*llama.cpp"),
    "no wavelength": (constant("rope.freq_base", None), "rope.freq_base is absent.*1000000.*llama.cpp"),
    "another local one": (constant("rope.freq_base_swa", 2e4), "rope.freq_base_swa is 20000.0.*10000.*llama.cpp"),
    "yarn": (constant("rope.scaling.type", "yarn", "add_string"), "rope.scaling.type is yarn.*llama.cpp"),
    "half rotated": (constant("rope.dimension_count", 8, "add_uint32"), "rope.dimension_count is 8.*16, the heads'"),
    "other values": (constant("attention.value_length", 8, "add_uint32"), "value_length is 8.*16, the heads'"),
    "other windows": (constant("attention.sliding_window_pattern", 2, "add_uint32"), "pattern is 2.*five of six"),
    "named windows": (
        constant("attention.sliding_window_pattern", [True, False], "add_array"),
        "sliding_window_pattern names other blocks.*llama.cpp",
    ),
    "an adapter": (
        only(("general.architecture", "gemma3"), ("general.type", "adapter")),
        "is a LoRA adapter.*Load the base model.*PEFT folder",
    ),
    "an imatrix": (only(("general.type", "imatrix")), "an importance matrix.*Give the model's own file"),
    "a picture encoder": (only(("general.architecture", "clip")), "picture encoder.*Give the text model's own file"),
    "a later part": (only(*LATER_PART), "number 2 of 3.*llama-gguf-split --merge, giving it the first"),
    "a type of tomorrow": (of_type(99), "ggml's type 99.*pip install -U gguf.*llama-quantize"),
    "a type without decoder": (of_type(24), "token_embd.weight is of type I8.*pip install -U gguf.*llama-quantize"),
    "fewer rows than text": (lambda p: rewrite(p, rows=300), "340 tokens, and an embedding of 300 rows.*Convert"),
}


@pytest.mark.parametrize("what", SPOILERS)
def test_a_malformed_file_is_refused_with_its_name_and_a_remedy(file, what):
    spoil, message = SPOILERS[what]
    spoil(file)
    with pytest.raises(GemmaLoraError, match=f"(?s){file}.*{message}"):
        load_gemma(file)


@pytest.mark.parametrize("name", ["unknown_token_id", "bos_token_id", "scores", "token_type", "tokens"])
def test_a_tokenizer_that_lacks_something_is_refused(file, name):
    # Renaming the key in place leaves everything else of the file as it was.
    key = f"tokenizer.ggml.{name}".encode()
    data = file.read_bytes()
    assert data.count(key) == 1
    file.write_bytes(data.replace(key, key[:-1] + b"_"))
    with pytest.raises(GemmaLoraError, match=f"(?s){file}.*tokenizer.*Convert"):
        gguf.read_index(file)


@pytest.mark.slow
def test_wherever_a_file_is_cut_it_is_refused_or_whole(tmp_path):
    whole = tmp_path / "whole.gguf"
    stored = write_gguf(whole)
    data = whole.read_bytes()
    first = gguf.read_index(whole)
    header = min(tensor.offset for tensor in first.tensors.values())
    end = max(tensor.offset + tensor.nbytes for tensor in first.tensors.values())
    cuts = [*np.linspace(0, header, 26).astype(int), *np.linspace(header, len(data), 15).astype(int)]
    refused = []
    for cut in [*cuts, end - 1, end]:
        part = tmp_path / f"part{cut}.gguf"
        part.write_bytes(data[:cut])
        try:
            index = gguf.read_index(part)
        except GemmaLoraError as error:
            assert str(part) in str(error)
            refused.append(cut)
            continue
        for name, array in stored.items():
            np.testing.assert_array_equal(gguf.read_tensor(index, name), array)
    assert max(refused) == end - 1 and len(refused) > 38


# --- the cached index --------------------------------------------------------------------------------------


def same(one, other):
    return (one.fields, one.tensors, one.tokenizer) == (other.fields, other.tensors, other.tokenizer)


def test_the_cached_index_equals_the_parsed_one(file, cache, monkeypatch):
    parsed = gguf.read_index(file)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".spm"]
    monkeypatch.setattr(gguf, "_parse", lambda path: pytest.fail("parsed again"))
    assert same(gguf.read_index(file), parsed)


DAMAGES = [b"", b"{", b"null", b"[]", b'{"tensors": {}}', b'{"fields": {}, "tensors": {"a": []}}']


@pytest.mark.parametrize("damage", [*DAMAGES, b'{"fields": {}, "tensors": {"a": 1}}', b"\xff"])
def test_a_damaged_cache_is_remade(file, cache, damage):
    parsed = gguf.read_index(file)
    (cached,) = cache.glob("*.json")
    cached.write_bytes(damage)
    assert same(gguf.read_index(file), parsed)
    assert cached.stat().st_size > 1000


@pytest.mark.parametrize("spoil", [lambda p: os.truncate(p, 900), lambda p: p.write_bytes(b""), Path.unlink])
def test_a_damaged_cached_tokenizer_is_remade(file, cache, spoil):
    parsed = gguf.read_index(file)
    (cached,) = cache.glob("*.spm")
    spoil(cached)
    assert same(gguf.read_index(file), parsed)
    assert cached.read_bytes() == parsed.tokenizer


def test_an_unwritable_cache_folder_costs_only_time(file, tmp_path, monkeypatch):
    parsed = gguf.read_index(file)
    (tmp_path / "a_file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a_file"))
    assert same(gguf.read_index(file), parsed)


def replaced(file, keep_time: bool):
    before = file.stat()
    new = file.with_name("new.gguf")
    write_gguf(new, seed=1, fields=FIELDS | {"attention.sliding_window": 9})
    assert new.stat().st_size == before.st_size
    os.replace(new, file)
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_file_replaced_by_another_of_its_size_gives_the_new_content(file, keep_time):
    assert gguf.read_index(file).fields["gemma3.attention.sliding_window"] == 6
    replaced(file, keep_time)  # `cp -p`, rsync and tar keep the time of the last change
    assert gguf.read_index(file).fields["gemma3.attention.sliding_window"] == 9


# --- the built-in weights ----------------------------------------------------------------------------------


@pytest.mark.real
def test_each_quantization_type_of_the_builtin_weights_is_decoded_as_the_gguf_library_does(monkeypatch):
    from gemma_lora.gemma.load import builtin_gguf

    monkeypatch.delenv("XDG_CACHE_HOME")  # the user's own cache: the file need not be put together again
    index = gguf.read_index(builtin_gguf())
    reader = gguf_library.GGUFReader(index.path)
    assert {tensor.name for tensor in reader.tensors} == set(index.tensors)
    smallest = {}
    for tensor in sorted(reader.tensors, key=lambda t: -t.n_bytes):
        smallest[tensor.tensor_type] = tensor
    assert {"F32", "Q4_K", "Q6_K"} <= {kind.name for kind in smallest}
    for kind, tensor in smallest.items():
        expected = gguf_library.dequantize(tensor.data, kind)
        np.testing.assert_array_equal(gguf.read_tensor(index, tensor.name), expected, err_msg=tensor.name)
