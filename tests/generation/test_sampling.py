"""What is drawn follows the distribution, and depends on seed, row and place only."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora.base.settings import Answering
from gemma_lora.generation import decoding, sampling
from gemma_lora.generation import engine as generation
from gemma_lora.quantization.packed import Bfloat16Rows, Int8Rows
from tests.conftest import CharacterTokenizer, tiny_gemma

DRAWS = 20_000


def expected(logits, temperature, top_k=None, top_p=None):
    """The distribution in float64, by sorting."""
    x = np.asarray(logits, "float64") / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_k is not None:
        p[p < np.sort(p)[-min(top_k, len(p))]] = 0
        p /= p.sum()
    if top_p is not None:
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return p


def counted(table, hidden, soft_cap, **named):
    numbers = np.arange(DRAWS)
    draw = jax.jit(
        lambda table, hidden, sample: sampling.drawn(
            table, jnp.broadcast_to(hidden, (DRAWS, len(hidden))), soft_cap, sample, 3
        )
    )
    tokens = draw(table, hidden, sampling.sampling_of(Answering(**named), numbers))
    return np.bincount(np.asarray(tokens), minlength=table.shape[0])


def assert_follows(counts, p):
    """Pearson's statistic is far from what a right sampler gives once in a million times; nothing else is drawn."""
    assert counts[p == 0].sum() == 0
    many = p * counts.sum() >= 5
    seen, due = np.append(counts[many], counts[~many].sum()), counts.sum() * np.append(p[many], p[~many].sum())
    seen, due = seen[due > 0], due[due > 0]
    statistic, freedom = ((seen - due) ** 2 / due).sum(), len(due) - 1
    assert statistic < freedom + 6 * np.sqrt(2 * freedom) + 20


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.4},
    {"temperature": 3.0, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 1000, "top_p": 1.0},
]


@pytest.mark.slow
@pytest.mark.parametrize("named", CASES, ids=str)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_tokens_follow_the_distribution(named, soft_cap):
    rng = np.random.default_rng(0)
    table, hidden = rng.normal(size=(77, 8)).astype("float32"), rng.normal(size=8).astype("float32")
    logits = table.astype("float64") @ hidden
    logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
    assert_follows(counted(jnp.asarray(table), jnp.asarray(hidden), soft_cap, **named), expected(logits, **named))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [Bfloat16Rows, Int8Rows])
def test_packed_tables_are_drawn_from_by_what_they_hold(packed, monkeypatch):
    monkeypatch.setattr(sampling, "_BLOCK", 32)  # three blocks, of which the last reaches back
    rng = np.random.default_rng(1)
    table = packed.of(rng.normal(size=(77, 8)).astype("float32"))
    hidden = rng.normal(size=8).astype(jnp.bfloat16).astype("float32")
    logits = np.asarray(table.decode(), "float64") @ hidden
    assert_follows(counted(table, jnp.asarray(hidden), None, temperature=1), expected(logits, 1))


@pytest.mark.slow
def test_a_wrong_temperature_would_be_found():
    rng = np.random.default_rng(0)
    table, hidden = rng.normal(size=(77, 8)).astype("float32"), rng.normal(size=8).astype("float32")
    counts = counted(jnp.asarray(table), jnp.asarray(hidden), None, temperature=1)
    with pytest.raises(AssertionError):
        assert_follows(counts, expected(table.astype("float64") @ hidden, 1.1))


def small(number=2):
    model = tiny_gemma(number)
    model.preprocessor = types.SimpleNamespace(tokenizer=CharacterTokenizer())
    return model


@pytest.mark.slow
def test_the_first_token_of_a_gemma_2_is_drawn_from_its_soft_capped_logits():
    model = small()
    prompt = np.array([5, 9, 11], "int32")
    named = {"temperature": 0.5, "top_p": 0.9}
    x = {"token_ids": prompt[None], "padding_mask": np.ones((1, 3), "int32")}
    hidden = np.asarray(model.backbone(x), "float64")[0, -1]
    logits = np.asarray(model.backbone.token_embedding.embeddings, "float64") @ hidden
    logits = 3.0 * np.tanh(logits / 3.0)
    rows = generation.generate_tokens(model, [prompt] * 3000, [299], 1, 3000, answering=Answering(**named))
    tokens = np.array([row[0] if len(row) else 299 for row in rows])
    assert_follows(np.bincount(tokens, minlength=300), expected(logits, **named))


@pytest.mark.slow
def test_a_draw_depends_on_seed_and_row_and_not_on_the_batch():
    model, prompts = small(3), [np.array([5, 9, n], "int32") for n in range(7)]

    def drawn(**named):
        answering = Answering(temperature=1.5, seed=named.pop("seed", 0))
        return [
            row.tolist() for row in generation.generate_tokens(model, prompts, [1], 20, answering=answering, **named)
        ]

    together = drawn()
    assert drawn() == together == drawn(batch_size=3)
    assert drawn(seed=1) != together
    same = generation.generate_tokens(model, [prompts[0]] * 2, [1], 20, answering=Answering(temperature=1.5))
    assert same[0].tolist() != same[1].tolist()  # two rows of one prompt are two draws
    assert same[0].tolist() == together[0]


@pytest.mark.slow
def test_temperature_zero_and_none_are_greedy_and_tiny_temperatures_nearly():
    model = small(3)
    greedy = generation.generate(model, "ab", max_new_tokens=20)
    assert generation.generate(model, "ab", max_new_tokens=20, temperature=None) == greedy
    assert generation.generate(model, "ab", max_new_tokens=20, temperature=1e-4) == greedy
    assert generation.generate(model, "ab", max_new_tokens=20, temperature=9, top_k=1) == greedy
    assert generation.generate(model, "ab", max_new_tokens=20, temperature=9) != greedy


def test_the_greedy_program_has_no_randomness_in_it(gemma):
    engine = decoding.Engine.of(gemma, False)
    own, shared = (decoding.empty(engine.architecture, *sizes) for sizes in ((2, 32), (1, 0)))
    arguments = (np.zeros(2, "int32"), np.ones(2, "int32"), 0, np.zeros(2, bool))
    named = {"own": own, "shared": shared, "stop_ids": np.array([1]), "most": 16, "length": 16}

    def program(answering):
        sample = sampling.sampling_of(answering, range(2))
        lowered = decoding._decode_program.lower(
            engine.architecture, engine.weights, *arguments, sampling=sample, **named
        )
        return lowered.as_text()

    assert "threefry" not in program(Answering()) and "logistic" not in program(Answering())
    assert "threefry" in program(Answering(temperature=1))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 5}, "temperature"),
        ({"temperature": 1, "top_k": 0}, "top_k"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"temperature": 1, "top_p": 1.5}, "top_p"),
        ({"temperature": 1, "seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": [3]}, "stop"),
    ],
)
def test_bad_arguments_are_named(named, said):
    model = types.SimpleNamespace(preprocessor=types.SimpleNamespace(tokenizer=CharacterTokenizer()))
    with pytest.raises(ValueError, match=f"`{said}`"):
        generation.generate(model, "x", **named)
