"""Gemma 3 270M itself: tokens, logits and greedy text against sentencepiece, transformers and llama.cpp."""

import numpy as np
import pytest
import torch

import gemma_lora as gl
from gemma_lora.gemma import gguf
from gemma_lora.gemma import load as gemma

TEXTS = [
    "12 lug 2024 Café Lumière 769,08 €",
    "Съешь же ещё этих мягких французских булок.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "いろはにほへと ちりぬるを 漢字とカタカナ",
    "天地玄黄，宇宙洪荒。日月盈昃",
    "키스의 고유조건은 입술끼리 만나야 한다",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "எல்லா மனிதப் பிறவிகளும் சுதந்திரமாகவே பிறக்கின்றன",
    "👩‍👩‍👧‍👦 🇯🇵 ✅ naïve 🤷🏽‍♂️",
    "def f(x):\n\treturn {'a': [x**2 for x in range(10)]}  # comment\n\n\n    y = 1",
    "a  b   c    d          e\t\t\tf \n \n\n\n\n g",
    "   leading and trailing   ",
    "",
    "<b>not a control token</b> ﬁ ½ ｆｕｌｌ",
]


@pytest.fixture(scope="module")
def path():
    return gemma.builtin_gguf()


@pytest.fixture(scope="module")
def ours():
    return gl.load_gemma()


@pytest.fixture(scope="module")
def transformers_pair(path):
    """`(model, tokenizer)` of transformers, read from the same file."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def llama(path):
    import llama_cpp

    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False)


@pytest.fixture(scope="module")
def llama_float32(path, tmp_path_factory):
    """llama.cpp on a copy of the file whose tensors are decoded to float32, with a float32 cache.

    On quantized blocks llama.cpp rounds the activations to 8 bits, which decides near ties otherwise.
    """
    import gguf as library
    import llama_cpp

    target = tmp_path_factory.mktemp("gguf") / "float32.gguf"
    reader, writer = library.GGUFReader(path), library.GGUFWriter(target, "gemma3")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == library.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = library.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        writer.add_tensor(tensor.name, values.reshape([int(n) for n in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = llama_cpp.Llama(str(target), n_ctx=128, n_threads=2, logits_all=True, type_k=0, type_v=0, verbose=False)
    yield model
    model.close()
    target.unlink()


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_token_ids(text, ours, path, transformers_pair, llama):
    import sentencepiece

    ids = [int(i) for i in ours.preprocessor.tokenizer.tokenize(text)]
    processor = sentencepiece.SentencePieceProcessor(model_proto=gguf.read_index(path).tokenizer)
    assert ids == processor.encode(text)
    assert ids == transformers_pair[1](text, add_special_tokens=False)["input_ids"]
    assert ids == llama.tokenize(text.encode(), add_bos=False, special=False)


def test_logits(ours, transformers_pair, llama, llama_float32):
    ids = [2, *(int(i) for i in ours.preprocessor.tokenizer.tokenize("The capital of France is"))]
    x = {"token_ids": np.array([ids], "int32"), "padding_mask": np.ones((1, len(ids)), "int32")}
    mine = np.asarray(ours.backbone.token_embedding(ours.backbone(x), reverse=True))[0]
    with torch.no_grad():
        hf = transformers_pair[0](torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(mine, hf, atol=1e-3 * np.abs(hf).max())
    for engine, tolerance in ((llama_float32, 0.02), (llama, 1.0)):
        engine.reset()
        engine.eval(ids)
        cpp = np.asarray(engine.scores[len(ids) - 1])
        top = np.argsort(mine[-1])[::-1][:50]
        np.testing.assert_allclose(cpp[top], mine[-1][top], atol=tolerance)
        assert list(np.argsort(cpp)[::-1][:2]) == list(top[:2])


@pytest.mark.parametrize("prompt", ["The capital of France is", "Es war einmal", "def fibonacci(n):"])
def test_greedy_text(prompt, ours, transformers_pair, llama_float32):
    from gemma_lora.generation.engine import generate_tokens

    ids = np.array([2, *(int(i) for i in ours.preprocessor.tokenizer.tokenize(prompt))], "int32")
    (mine,) = generate_tokens(ours, [ids], [1], 24)
    with torch.no_grad():
        hf = transformers_pair[0].generate(torch.tensor(ids[None].astype("int64")), max_new_tokens=24, do_sample=False)
    theirs = [int(i) for i in hf[0, len(ids) :]]
    assert mine.tolist() == (theirs[: theirs.index(1)] if 1 in theirs else theirs)
    out = []
    for token in llama_float32.generate([int(i) for i in ids], temp=0.0, top_k=1, repeat_penalty=1.0):
        if token == 1 or len(out) == 24:
            break
        out.append(int(token))
    assert mine.tolist() == out
