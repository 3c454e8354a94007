"""Which weights are instruction-tuned, by what their name or file says; a chat template says nothing."""

import types

import pytest

import gemma_lora as gl
from gemma_lora.data.templates import Template
from gemma_lora.gemma.instruction import is_instruction_tuned
from gemma_lora.gemma.load import BUILTIN_NAME
from tests.conftest import CharacterTokenizer, tiny_gemma

CHAT = {"tokenizer.chat_template": "{{ bos_token }}<start_of_turn>"}


@pytest.mark.parametrize(
    ("source", "fields", "tuned"),
    [
        (BUILTIN_NAME, None, False),
        ("gemma3_1b", None, False),
        ("gemma2_2b_en", None, False),
        ("gemma3_instruct_1b", None, True),
        ("gemma_instruct_2b_en", None, True),
        ("hf://google/gemma-3-1b-it", None, True),
        ("hf://google/gemma-3-1b-pt", None, False),
        ("kaggle://keras/gemma2/keras/gemma2_instruct_2b_en/1", None, True),
        ("runs/mine", None, False),
        ("gemma3_orbit", None, False),
        ("gemma3-italian", None, False),
        ("models/gemma-3-1b-it", None, True),
        ("bits/withit/gemma.gguf", {}, False),
        ("it/gemma.gguf", {}, False),  # a folder above says nothing about the file
        ("gemma-3-270m-it-Q4_K_M.gguf", {}, True),
        ("gemma-3-270m_it.gguf", {}, True),
        ("gemma-3-270m-Instruct.gguf", {}, True),
        ("gemma.gguf", {"general.name": "Gemma 3 270m It"}, True),
        ("gemma.gguf", {"general.finetune": "it"}, True),
        ("gemma.gguf", {"general.basename": "gemma-3-instruct"}, True),
        ("gemma.gguf", {"general.name": "Gemma 3 270m", "general.basename": "gemma-3"} | CHAT, False),
    ],
)
def test_the_name_or_the_file_says_it(source, fields, tuned):
    assert is_instruction_tuned(source, fields) is tuned


@pytest.mark.slow
@pytest.mark.parametrize(("tuned", "template"), [(False, Template.base()), (True, Template.gemma_chat())])
def test_answers_and_training_take_the_weights_template(tuned, template):
    """Where neither caller nor adapter nor dataset names one."""
    model = tiny_gemma()
    model.preprocessor = types.SimpleNamespace(tokenizer=CharacterTokenizer())
    model.gemma_lora_instruction_tuned = tuned
    other = Template.gemma_chat() if template == Template.base() else Template.base()
    answer = gl.generate(model, "ab", max_new_tokens=6)
    assert answer == gl.generate(model, "ab", template, 6) != gl.generate(model, "ab", other, 6)
    gl.apply_lora(model, rank=1)
    lines = gl.load_dataset([{"prompt": f"p{n}", "response": "r"} for n in range(4)])
    tuner = gl.FineTuner(model, row_length=96)
    tuner.fit(lines, epochs=1, verbose=0)
    assert model.gemma_lora_template == template
    named = gl.load_dataset([{"prompt": f"p{n}", "response": "r"} for n in range(4)], template=template)
    assert [b.targets.tolist() for b in tuner.batches(lines)] == [b.targets.tolist() for b in tuner.batches(named)]
