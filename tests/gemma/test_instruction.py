"""Which weights are instruction-tuned, by what their name or file says; a chat template says nothing."""

import pytest

from gemma_lora.gemma.instruction import is_instruction_tuned
from gemma_lora.gemma.load import BUILTIN_NAME

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
