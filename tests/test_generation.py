"""Batched generation with a cache equals the naive loop that recomputes everything."""

import numpy as np
import pytest

from gemma_lora import generation, lora

PROMPTS = [np.array([5, 9, 11], "int32"), np.array([40, 41, 42, 43, 44], "int32")]


def naive(model, prompt, stop_ids, max_new_tokens, length=96):
    """Everything anew for each token. Padding behind the text, which no token sees, keeps one shape for all."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        padding_mask = (np.arange(length) < len(ids)).astype("int32")
        x = {"token_ids": np.pad(ids, (0, length - len(ids)))[None], "padding_mask": padding_mask[None]}
        hidden = np.asarray(model.backbone(x))[0, len(ids) - 1]
        token = int((np.asarray(model.backbone.token_embedding.embeddings) @ hidden).argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("shared", [0, 40])
def test_equals_the_naive_loop(any_gemma, shared):
    rng = np.random.default_rng(1)
    beginning = rng.integers(5, 300, shared)
    prompts = [np.concatenate([beginning, rng.integers(5, 300, n)]).astype("int32") for n in (3, 30, 5, 19, 4, 3)]
    answers = generation.generate_tokens(any_gemma, prompts, [1, 7], max_new_tokens=9, batch_size=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tolist() == naive(any_gemma, prompt, [1, 7], 9)


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
