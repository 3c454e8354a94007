"""The adapters that are kept in `data/`: whole, finite, and of the base that they were trained on."""

from pathlib import Path

import pytest

from gemma_lora.exchange.peft_folder import read_folder
from gemma_lora.gemma.load import BUILTIN_SHA256
from gemma_lora.gemma.origin import BUILTIN_HUB_NAME, Origin

KEPT = sorted(Path(__file__).parents[2].glob("data/*/adapter"))


def test_there_is_one():
    assert "expenses" in [folder.parent.name for folder in KEPT]


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.parent.name)
def test_a_kept_adapter_names_its_base_and_has_its_template(folder):
    read = read_folder(folder)
    assert read.base == Origin(BUILTIN_HUB_NAME, BUILTIN_SHA256, "Q4_K_M")
    assert read.template is not None and len(read.modules) == 7 * 18
