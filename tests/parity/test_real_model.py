"""Gemma 3 270M itself: tokens, logits and greedy text against sentencepiece, transformers and llama.cpp."""

import numpy as np
import pytest
import torch

import gemma_lora as gl
from gemma_lora import gemma, gguf

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


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_token_ids(text, ours, path, transformers_pair, llama):
    import sentencepiece

    ids = [int(i) for i in ours.preprocessor.tokenizer.tokenize(text)]
    processor = sentencepiece.SentencePieceProcessor(model_proto=gguf.read_index(path).tokenizer)
    assert ids == processor.encode(text)
    assert ids == transformers_pair[1](text, add_special_tokens=False)["input_ids"]
    assert ids == llama.tokenize(text.encode(), add_bos=False, special=False)


def test_logits(ours, transformers_pair, llama):
    ids = [2, *(int(i) for i in ours.preprocessor.tokenizer.tokenize("The capital of France is"))]
    x = {"token_ids": np.array([ids], "int32"), "padding_mask": np.ones((1, len(ids)), "int32")}
    mine = np.asarray(ours.backbone.token_embedding(ours.backbone(x), reverse=True))[0]
    with torch.no_grad():
        hf = transformers_pair[0](torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(mine, hf, atol=1e-3 * np.abs(hf).max())
    llama.reset()
    llama.eval(ids)
    # llama.cpp multiplies the quantized blocks with activations in 8 bits: close, and the same order at the top.
    cpp = np.asarray(llama.scores[len(ids) - 1])
    top = np.argsort(mine[-1])[::-1][:5]
    assert list(np.argsort(cpp)[::-1][:2]) == list(top[:2])
    np.testing.assert_allclose(cpp[top], mine[-1][top], atol=1.0)


@pytest.mark.parametrize("prompt", ["The capital of France is", "Es war einmal", "def fibonacci(n):"])
def test_greedy_text(prompt, ours, transformers_pair, llama):
    from gemma_lora.generation import generate_tokens

    ids = np.array([2, *(int(i) for i in ours.preprocessor.tokenizer.tokenize(prompt))], "int32")
    (mine,) = generate_tokens(ours, [ids], [1], 24)
    with torch.no_grad():
        hf = transformers_pair[0].generate(torch.tensor(ids[None].astype("int64")), max_new_tokens=24, do_sample=False)
    theirs = [int(i) for i in hf[0, len(ids) :]]
    assert mine.tolist() == (theirs[: theirs.index(1)] if 1 in theirs else theirs)
    out = llama.create_completion(prompt, max_tokens=8, temperature=0.0)["choices"][0]["text"]
    assert ours.preprocessor.tokenizer.detokenize([int(i) for i in mine[:8]]).startswith(out[:12])
