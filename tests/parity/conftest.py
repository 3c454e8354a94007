"""Parity with other engines: transformers, PEFT, llama.cpp and sentencepiece, on the same files and adapters."""

import importlib.util
import os

import numpy as np
import pytest

ENGINES = ("torch", "transformers", "peft", "llama_cpp", "bitsandbytes")
if any(importlib.util.find_spec(name) is None for name in ENGINES):
    collect_ignore_glob = ["test_*.py"]  # without the extra `parity` there is nothing to compare with: no test is run


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Under `make parity` a skipped test is a failed run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("GEMMA_LORA_PARITY") and reporter.stats.get("skipped"):
        session.exitstatus = 1


#: What every tiny model has; the sizes differ from one another, so that no transposition goes unseen.
COMMON = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "attn_implementation": "eager",
}


def tiny_transformers(generation: int):
    """A random Gemma 1, 2 or 3 of transformers."""
    import torch
    import transformers as tf

    torch.manual_seed(generation)
    if generation == 1:
        config = tf.GemmaConfig(**COMMON)
        model = tf.GemmaForCausalLM(config)
    elif generation == 2:
        config = tf.Gemma2Config(
            **COMMON,
            query_pre_attn_scalar=8,
            sliding_window=6,
            final_logit_softcapping=3.0,
            attn_logit_softcapping=5.0,
        )
        model = tf.Gemma2ForCausalLM(config)
    else:
        config = tf.Gemma3TextConfig(**COMMON, query_pre_attn_scalar=8, sliding_window=6)
        model = tf.Gemma3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def to_keras_hub(model, generation: int):
    """The same weights in KerasHub's Gemma, written out here so that no loader of ours is trusted."""
    from gemma_lora.gemma.load import import_keras_hub

    hub = import_keras_hub()
    sizes = {
        "vocabulary_size": COMMON["vocab_size"],
        "num_layers": 2,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": 24,
        "head_dim": 8,
        "dtype": "float32",
    }
    norms = {"use_post_ffw_norm": True, "use_post_attention_norm": True}
    window = {"use_sliding_window_attention": True, "sliding_window_size": 6}
    if generation == 3:
        backbone = hub.models.Gemma3Backbone(
            **sizes, intermediate_dim=40, image_size=16, query_head_dim_normalize=True, **norms, **window
        )
        causal_lm = hub.models.Gemma3CausalLM(preprocessor=None, backbone=backbone)
    else:
        # KerasHub's Gemma 1 and 2 count gate and up together: intermediate_dim is twice transformers'.
        caps = {"final_logit_soft_cap": 3.0, "attention_logit_soft_cap": 5.0, **norms, **window}
        backbone = hub.models.GemmaBackbone(
            **sizes, intermediate_dim=80, query_head_dim_normalize=True, **(caps if generation == 2 else {})
        )
        causal_lm = hub.models.GemmaCausalLM(preprocessor=None, backbone=backbone)
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    backbone.token_embedding.embeddings.assign(weights["model.embed_tokens.weight"])
    backbone.layer_norm.scale.assign(weights["model.norm.weight"])
    for number, block in enumerate(backbone.transformer_layers):

        def of(name, number=number):
            return weights[f"model.layers.{number}.{name}.weight"]

        attention = block.attention
        attention.query_dense.kernel.assign(of("self_attn.q_proj").reshape(4, 8, 24).transpose(0, 2, 1))
        attention.key_dense.kernel.assign(of("self_attn.k_proj").reshape(2, 8, 24).transpose(0, 2, 1))
        attention.value_dense.kernel.assign(of("self_attn.v_proj").reshape(2, 8, 24).transpose(0, 2, 1))
        attention.output_dense.kernel.assign(of("self_attn.o_proj").T.reshape(4, 8, 24))
        block.gating_ffw.kernel.assign(of("mlp.gate_proj").T)
        block.gating_ffw_2.kernel.assign(of("mlp.up_proj").T)
        block.ffw_linear.kernel.assign(of("mlp.down_proj").T)
        block.pre_attention_norm.scale.assign(of("input_layernorm"))
        if generation == 1:
            block.pre_ffw_norm.scale.assign(of("post_attention_layernorm"))
        else:
            block.post_attention_norm.scale.assign(of("post_attention_layernorm"))
            block.pre_ffw_norm.scale.assign(of("pre_feedforward_layernorm"))
            block.post_ffw_norm.scale.assign(of("post_feedforward_layernorm"))
        if generation == 3:
            attention.query_norm.scale.assign(of("self_attn.q_norm"))
            attention.key_norm.scale.assign(of("self_attn.k_norm"))
    return causal_lm


@pytest.fixture(params=[1, 2, 3], ids=["gemma1", "gemma2", "gemma3"])
def pair(request):
    """`(transformers' model, KerasHub's model)` with the same weights."""
    theirs = tiny_transformers(request.param)
    return theirs, to_keras_hub(theirs, request.param)


@pytest.fixture
def token_ids():
    """(3, 14) token ids without padding."""
    return np.random.default_rng(7).integers(3, COMMON["vocab_size"], (3, 14)).astype("int32")
