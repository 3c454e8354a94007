"""PEFT's folders to the letter: which layer gets which rank and alpha, what is refused, what PEFT makes of ours."""

import itertools
import random
import warnings

import keras
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from gemma_lora import lora
from gemma_lora.base.files import GemmaLoraError
from gemma_lora.exchange.peft import load_adapter, save_adapter, slots
from gemma_lora.exchange.peft_names import is_targeted, pattern_for
from gemma_lora.layers.surgery import replace
from tests.parity.conftest import tiny_transformers, to_keras_hub
from tests.parity.test_adapters import KINDS, assert_close, our_logits, their_logits

MODULES = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
NAMES = [
    f"model.layers.{layer}.{'self_attn' if kind[0] in 'qkvo' else 'mlp'}.{kind}"
    for layer, kind in itertools.product((0, 1, 11), MODULES)
]


def moved(adapted, seed=0):
    """PEFT's model with every trained number moved, the start's A too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rank_and_alpha_of_each_layer_from_peft(pair, token_ids, kind, tmp_path):
    theirs, ours = pair
    named = {("use_" + name): value for name, value in kind.items()}
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=MODULES,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "model.layers.[01].mlp.up_proj": 4, "down_proj": 1},
        alpha_pattern={"^model.layers.1.mlp.gate_proj": 7, ".*v_proj": 2, "self_attn": 100},
        task_type="CAUSAL_LM",
        **named,
    )
    adapted = moved(get_peft_model(theirs, config))
    adapted.save_pretrained(tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    expected = their_logits(adapted, token_ids)
    assert_close(our_logits(ours, token_ids), expected, 5e-5)
    assert {layer.rank for layer in lora.lora_layers(ours)} == {1, 2, 3, 4}
    save_adapter(ours, tmp_path / "ours")
    back = PeftModel.from_pretrained(adapted.unload(), tmp_path / "ours").eval()
    assert_close(their_logits(back, token_ids), expected, 5e-5)


@pytest.mark.parametrize("seed", range(4))
def test_any_layers_any_ranks_to_peft_without_a_word(pair, token_ids, seed, tmp_path):
    """Places drawn at random, each with its own rank and alpha: PEFT gets exactly these, and warns of nothing."""
    theirs, ours = pair
    rng = np.random.default_rng(seed)
    chosen = [slot for slot in slots(ours) if rng.random() < 0.4]
    for slot in chosen:
        cls = lora.LoRADense if isinstance(slot.layer, keras.layers.Dense) else lora.LoRAEinsumDense
        layer = cls(slot.layer, int(rng.integers(1, 6)), alpha=float(rng.integers(1, 9)), dora=seed % 2 == 1)
        layer.lora_b.assign(rng.normal(0, 0.3, layer.lora_b.shape))
        replace(slot.parent, slot.attribute, layer)
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(theirs, tmp_path)
    assert not [w for w in said if not issubclass(w.category, FutureWarning)]  # transformers' own of the next version
    has_lora = {name.removesuffix(".lora_A.default") for name, _ in adapted.named_modules() if "lora_A.default" in name}
    assert has_lora == {f"base_model.model.{slot.module}" for slot in chosen}
    assert_close(our_logits(ours, token_ids), their_logits(adapted.eval(), token_ids), 5e-5)


PATTERNS = [
    "q_proj", "layers.1.self_attn.q_proj", "^model.layers.0.mlp.up_proj", ".*", "layers.1", "mlp", "^q_proj", "o_proj$",
    r"layers\.(0|11)\..*_proj", "[qk]_proj", "self_attn.*", "(gate|up)_proj", "proj", "model.layers.1.mlp.down_proj",
]  # fmt: skip


def test_patterns_are_matched_as_peft_matches_them():
    rng = random.Random(0)
    for _ in range(300):
        patterns = rng.sample(PATTERNS, rng.randint(1, 5))
        for name in NAMES:
            theirs = get_pattern_key(patterns, name)
            assert pattern_for(patterns, [name]) == (None if theirs == name and name not in patterns else theirs)


def test_targets_are_matched_as_peft_matches_them():
    rng = random.Random(1)
    for _ in range(300):
        targets = rng.choice([rng.choice(PATTERNS), rng.sample([*MODULES, *NAMES, "self_attn.q_proj"], 4)])
        config = {
            "target_modules": targets,
            "exclude_modules": rng.choice([None, "q_proj", [rng.choice(MODULES)], r".*\.1\..*"]),
            "layers_to_transform": rng.choice([None, [], [1], [0, 11], 0]) if isinstance(targets, list) else None,
        }
        theirs = LoraConfig(**config)
        for name in NAMES:
            assert is_targeted(config, [name]) == bool(check_target_module_exists(theirs, name)), (config, name)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_is_refused(start, tmp_path):
    """PEFT's own output differs from base plus factors; converted by PEFT, the folder is read and is equal."""
    theirs, ours = tiny_transformers(3), to_keras_hub(tiny_transformers(3), 3)
    token_ids = np.arange(12)[None] + 5
    config = LoraConfig(r=3, target_modules=MODULES, init_lora_weights=start, task_type="CAUSAL_LM")
    adapted = get_peft_model(theirs, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = start
    moved(adapted)
    expected = their_logits(adapted, token_ids)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(GemmaLoraError, match=f"init_lora_weights is '{start}'"):
        load_adapter(ours, tmp_path / "adapter")
    adapted.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    load_adapter(ours, tmp_path / "converted")
    assert_close(our_logits(ours, token_ids), expected, 1e-4)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica", False])
def test_a_start_that_leaves_the_base_is_read(start, tmp_path):
    theirs, ours = tiny_transformers(3), to_keras_hub(tiny_transformers(3), 3)
    token_ids = np.arange(12)[None] + 5
    config = LoraConfig(r=4, target_modules=MODULES, init_lora_weights=start, task_type="CAUSAL_LM")
    adapted = moved(get_peft_model(theirs, config))
    adapted.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert_close(our_logits(ours, token_ids), their_logits(adapted, token_ids), 5e-5)


def test_lora_on_the_head_is_refused(tmp_path):
    theirs = tiny_transformers(3)
    ours = to_keras_hub(theirs, 3)
    adapted = moved(get_peft_model(theirs, LoraConfig(r=3, target_modules=["q_proj", "lm_head"])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        adapted.save_pretrained(tmp_path)
    with pytest.raises(GemmaLoraError, match="embed|lm_head|lora_A"):
        load_adapter(ours, tmp_path)
