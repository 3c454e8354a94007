"""Batched generation with a cache equals the naive loop that recomputes everything."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora import lora
from gemma_lora.gemma.forward import forward
from gemma_lora.generation import decoding, sampling
from gemma_lora.generation import engine as generation
from gemma_lora.layers.products import Rounded
from gemma_lora.lora import qlora
from gemma_lora.quantization.packed import Bfloat16Rows, Int8Rows
from gemma_lora.training.tuner import FineTuner
from tests.conftest import tiny_gemma

PROMPTS = [np.array([5, 9, 11], "int32"), np.array([40, 41, 42, 43, 44], "int32")]


def blocks(model):
    return model.backbone.transformer_layers


def naive(model, prompt, stop_ids, max_new_tokens, length=96, logits=None):
    """Everything anew for each token. Padding behind the text, which no token sees, keeps one shape for all."""

    def plain(x, last):
        return np.asarray(model.backbone.token_embedding.embeddings) @ np.asarray(model.backbone(x))[0, last]

    ids = list(prompt)
    for _ in range(max_new_tokens):
        padding_mask = (np.arange(length) < len(ids)).astype("int32")
        x = {"token_ids": np.pad(ids, (0, length - len(ids)))[None], "padding_mask": padding_mask[None]}
        token = int((logits or plain)(x, len(ids) - 1).argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 40])
def test_equals_the_naive_loop(any_gemma, shared):
    rng = np.random.default_rng(1)
    beginning = rng.integers(5, 300, shared)
    prompts = [np.concatenate([beginning, rng.integers(5, 300, n)]).astype("int32") for n in (3, 30, 5, 19, 4, 3)]
    answers = generation.generate_tokens(any_gemma, prompts, [1, 7], max_new_tokens=18, batch_size=4)
    assert max(map(len, answers)) == 18  # more than the program makes at a time
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tolist() == naive(any_gemma, prompt, [1, 7], 18)


@pytest.mark.slow
def test_layers_without_a_window_have_rotations_of_their_own():
    model = tiny_gemma(3, layers=6)  # Gemma 3's sixth is the first of them
    kinds = {(b.attention.rope_layer.max_wavelength, b.use_sliding_window_attention) for b in blocks(model)}
    assert len(kinds) == 2
    prompts = [np.random.default_rng(n).integers(5, 300, n).astype("int32") for n in (80, 60)]
    for prompt, answer in zip(prompts, generation.generate_tokens(model, prompts, [1], 9), strict=True):
        assert answer.tolist() == naive(model, prompt, [1], 9)


@pytest.mark.slow
def test_answers_may_be_long():
    """Longer than twice what the compiled program makes at a time, so that what it has put away is read."""
    gemma = tiny_gemma(1)  # without a window
    answers = generation.generate_tokens(gemma, PROMPTS, [1], 40)
    assert [len(answer) for answer in answers] == [40, 40]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tolist() == naive(gemma, prompt, [1], 40)


@pytest.mark.slow
def test_mixed_precision_makes_the_tokens_of_the_rounded_model(any_gemma, monkeypatch):
    """`FineTuner` rounds the same kernels while training; there everything is computed anew for each token."""
    any_gemma.backbone.trainable = False
    any_gemma.backbone.layer_norm.trainable = True  # `FineTuner` wants something to train
    tuner = FineTuner(any_gemma, mixed_precision=True)
    # Generation rounds what frozen weights meet, not attention's factors.
    monkeypatch.setattr("gemma_lora.gemma.attention.batched_product", jnp.matmul)
    table = np.asarray(tuner.rounded_embeddings.value).view(jnp.bfloat16).astype("float32")

    def logits(x, last):
        hidden = np.asarray(tuner(x, training=True))[0, last]
        return table @ np.asarray(jnp.asarray(hidden, jnp.bfloat16), "float32")

    prompts = [np.random.default_rng(n).integers(5, 300, n).astype("int32") for n in (20, 9, 5)]
    answers = generation.generate_tokens(any_gemma, prompts, [1], 9, mixed_precision=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tolist() == naive(any_gemma, prompt, [1], 9, logits=logits)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_mixed_precision_rounds_every_product_with_frozen_weights(gemma, adapter):
    if adapter:
        lora.apply_lora(gemma, rank=2, targets=("query", "value"))

    def rounded(mixed_precision):
        engine = decoding.Engine.of(gemma, mixed_precision)
        own, shared = (decoding.empty(engine.architecture, *sizes) for sizes in ((2, 32), (1, 0)))
        arguments = (np.zeros(2, "int32"), np.ones(2, "int32"), 0, np.zeros(2, bool))
        named = {"own": own, "shared": shared, "stop_ids": np.array([1]), "most": 16, "length": 16}
        program = decoding._decode_program.lower(engine.architecture, engine.weights, *arguments, **named).as_text()
        return sum("dot_general" in line and "xbf16>" in line for line in program.splitlines())

    assert (rounded(False), rounded(True)) == (0, 7 * len(blocks(gemma)) + 1)  # and the head


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lora", "int8"])
def test_mixed_precision_leaves_layers_with_keras_own_changes_alone(how):
    gemma = tiny_gemma(3)
    if how == "lora":
        gemma.backbone.enable_lora(2)
        for layer in gemma.backbone._flatten_layers():
            if getattr(layer, "lora_enabled", False) and hasattr(layer, "lora_kernel_b"):
                layer.lora_kernel_b.assign(np.random.default_rng(0).normal(0, 2, layer.lora_kernel_b.shape))
        left = {"query", "value"}
    else:
        for block in blocks(gemma):
            block.ffw_linear.quantize("int8")
        left = {"down"}
    weights = decoding.Engine.of(gemma, True).weights
    rounded = {name for block in weights.blocks for name, matrix in block.linear.items() if type(matrix) is Rounded}
    assert not rounded & left and "key" in rounded
    for prompt, answer in zip(PROMPTS, generation.generate_tokens(gemma, PROMPTS, [1], 3), strict=True):
        assert answer.tolist() == naive(gemma, prompt, [1], 3)


@pytest.mark.slow
def test_a_second_call_compiles_nothing_and_sees_what_has_changed(gemma, monkeypatch):
    traced = []
    monkeypatch.setattr(decoding, "forward", lambda *args: traced.append(args) or forward(*args))
    decoding._prefill_program.clear_cache()
    decoding._decode_program.clear_cache()

    def answers(**named):
        return [a.tolist() for a in generation.generate_tokens(gemma, PROMPTS, [1], 9, **named)]

    def naive_answers():
        return [naive(gemma, prompt, [1], 9) for prompt in PROMPTS]

    before = answers()
    programs = len(traced)
    assert answers() == before
    kernel = gemma.backbone.transformer_layers[0].gating_ffw._kernel
    kernel.assign(-kernel)  # other values go through the same programs
    changed = answers()
    assert changed == naive_answers() != before
    assert len(traced) == programs > 0
    lora.apply_lora(gemma, rank=2, targets="all-linear")  # so does an update, which is added to its kernel
    assert answers() == changed
    for number, layer in enumerate(lora.lora_layers(gemma)):
        layer.lora_b.assign(np.random.default_rng(number).normal(0, 0.5, layer.lora_b.shape))
    adapted = answers()
    assert adapted == naive_answers() != changed
    lora.merge_lora(gemma)
    assert answers() == adapted
    lora.detach_lora(gemma)
    assert answers() == adapted
    assert len(traced) <= 2 * programs  # once more: kernels as matrices, then as layers store them
    answers(mixed_precision=True)
    assert answers() == adapted


@pytest.mark.slow
@pytest.mark.parametrize("generate", [False, True])
def test_the_kernels_that_packing_replaces_are_not_kept(gemma, generate):
    if generate:
        generation.generate_tokens(gemma, PROMPTS, [1], 3)
    kernels = [weakref.ref(layer._kernel) for _, _, layer in lora.plain_layers(gemma)]
    packed = qlora.quantize_base(gemma, "int8")
    if generate:
        generation.generate_tokens(gemma, PROMPTS, [1], 3)
    codes = [weakref.ref(layer.parts["codes"]) for layer in qlora.packed_layers(packed)]
    gc.collect()
    assert [kernel() for kernel in kernels] == [None] * 14
    qlora.dequantize_base(gemma)
    gc.collect()
    assert [part() for part in codes] == [None] * 14


@pytest.mark.slow
def test_the_likeliest_token_is_the_first_of_the_largest_logits():
    rng = np.random.default_rng(0)
    table, hidden = rng.normal(size=(9001, 8)).astype("float32"), rng.normal(size=(5, 8)).astype("float32")
    best = (table @ hidden.T).argmax(axis=0)
    table[(best[0] + 5000) % 9001] = table[best[0]]  # a tie across blocks
    table[9000] = table[best[1]] = 9 * hidden[1]  # and one with the last row, which two blocks hold
    rounded = Bfloat16Rows.of(table)
    exact = np.asarray(rounded.decode()) @ np.asarray(jnp.asarray(hidden, jnp.bfloat16), "float32").T
    assert np.asarray(sampling.likeliest(rounded, jnp.asarray(hidden))).tolist() == exact.argmax(axis=0).tolist()
    plain = sampling.likeliest(jnp.asarray(table), jnp.asarray(hidden))
    assert np.asarray(plain).tolist() == (table @ hidden.T).argmax(axis=0).tolist()
    packed = Int8Rows.of(table)
    found = sampling.likeliest(packed, jnp.asarray(hidden))
    assert np.asarray(found).tolist() == (np.asarray(packed.decode()) @ hidden.T).argmax(axis=0).tolist()


def test_the_model_is_as_it_was(gemma):
    def state():
        return [{k: v for k, v in vars(layer).items() if callable(v)} for layer in gemma.backbone._flatten_layers()]

    before = state()
    generation.generate_tokens(gemma, PROMPTS, [1], 3, mixed_precision=True)
    assert state() == before


@pytest.mark.slow
def test_an_adapter_counts_as_in_the_naive_loop(gemma):
    """The update is added to copies of the kernels for generation; here it is kept apart."""
    base = generation.generate_tokens(gemma, PROMPTS, [1], 9)
    lora.apply_lora(gemma, rank=2, targets="all-linear")
    for number, layer in enumerate(lora.lora_layers(gemma)):
        layer.lora_b.assign(np.random.default_rng(number).normal(0, 0.5, layer.lora_b.shape))
    answers = generation.generate_tokens(gemma, PROMPTS, [1], 9)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tolist() == naive(gemma, prompt, [1], 9)
    assert any(a.tolist() != b.tolist() for a, b in zip(answers, base, strict=True))


@pytest.mark.slow
def test_stops_at_every_stop_token(gemma):
    prompts = [np.array([5, 9, 11], "int32")]
    free = generation.generate_tokens(gemma, prompts, [1], 12)[0]
    stop = int(free[4])
    first = free.tolist().index(stop)
    stopped = generation.generate_tokens(gemma, prompts, [1, stop], 12)[0]
    assert stopped.tolist() == free[:first].tolist()


def test_progress_and_order(gemma):
    prompts = [np.arange(5, 5 + n, dtype="int32") for n in (9, 4, 6)]
    seen = []
    together = generation.generate_tokens(gemma, prompts, [1], 4, batch_size=2, on_progress=lambda *a: seen.append(a))
    assert seen == [(2, 3), (3, 3)]
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer.tolist() == generation.generate_tokens(gemma, [prompt], [1], 4)[0].tolist()


@pytest.mark.parametrize("named", [{"max_new_tokens": 0}, {"batch_size": 0}])
def test_bad_arguments_are_named(gemma, named):
    with pytest.raises(ValueError, match=next(iter(named))):
        generation.generate(gemma, ["x"], **named)
