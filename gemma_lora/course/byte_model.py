"""A language model small enough to train in a minute on two cores, over bytes of text that ships with Python.

A byte is a token: 256 of them, no tokenizer. The text is Python's own help topics (`pydoc_data.topics`), English prose
with some code. Losses are in bits a byte, so that an untrained guess is 8.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.base.keras_on_jax import keras, ops

#: Topics that no training text shares a paragraph with.
HELD_OUT = {
    "validation": ("import", "strings", "comparisons", "raise"),
    "test": ("typesmapping", "assignment", "calls", "binary"),
}


def read_topics() -> dict[str, np.ndarray]:
    """Python's help topics as bytes, in three parts that share no paragraph.

    Topics repeat one another: `for` is a section of `compound`, word for word. So a paragraph that stands in a test
    topic is taken out of the other two parts, one of a validation topic out of the training part, and any paragraph is
    read once only. Which topics there are depends on the version of Python; a missing one is passed over.

    Returns:
        `{"train": …, "validation": …, "test": …}`, (bytes,) uint8 each.

    Example:

    >>> bytes(read_topics()["validation"][:22]).decode()
    'The "import" statement'
    """
    from pydoc_data.topics import topics

    rest = sorted(topics.keys() - {name for names in HELD_OUT.values() for name in names})
    seen: set[str] = set()
    parts = {}
    for part, names in {"test": HELD_OUT["test"], "validation": HELD_OUT["validation"], "train": rest}.items():
        fresh = []
        for paragraph in (p for name in names for p in topics.get(name, "").split("\n\n")):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                fresh.append(paragraph.strip("\n"))
        parts[part] = np.frombuffer("\n\n".join(fresh).encode(), np.uint8)
    return {part: parts[part] for part in ("train", "validation", "test")}


def byte_transformer(
    linear: Callable[..., Any], width: int = 128, blocks: int = 2, heads: int = 4, context: int = 64, seed: int = 0
) -> keras.Model:
    """A transformer over bytes whose linear layers are made by `linear`, as `BitLinear` or its twin `NormLinear`.

    A block adds attention and then an MLP to the residual stream: x + linear(attention(linear(x))), then
    x + linear(ReLU(linear(x))²). `linear` brings the norm along. One layer makes queries, keys and values; positions
    are rotary. The byte embedding, times √width at the input as in Gemma, and the logits, which use it again, are
    plain.

    Args:
        linear: Called as `linear(units, kernel_initializer=…, name=…)`, gives a layer (..., d_in) -> (..., units).
        width, blocks, heads: Integers; the width is an even number for each head.
        context: Integer, bytes a window.
        seed: Integer, of the first weights: with one seed, models of two kinds of `linear` start alike.

    Returns:
        A functional model, (B, T) integers -> (B, T, 256) logits of the next byte, T = `context`.

    Raises:
        ValueError: If `heads` does not divide `width` into even numbers.

    Example:

    >>> from gemma_lora.layers.bitnet import BitLinear
    >>> byte_transformer(BitLinear, width=8, blocks=1, heads=2, context=4).output_shape
    (None, 4, 256)

    Reference: BitNet b1.58 2B4T (Ma et al. 2025, https://arxiv.org/abs/2504.12285) has rotary positions and the squared
    ReLU too, a gate in the MLP besides, and kernels of their own for queries, keys and values.
    """
    if width % (2 * heads):  # rotary positions turn pairs
        raise ValueError(f"`heads` must divide `width`, an even number each. Received: width={width}, heads={heads}")
    seeds = itertools.count(1000 * seed)  # not Keras's global seed, which imports TensorFlow

    def layer(units: int, name: str):
        return linear(units, kernel_initializer=keras.initializers.GlorotUniform(next(seeds)), name=name)

    tokens = keras.Input((context,), dtype="int32", name="bytes")
    first = keras.initializers.RandomUniform(-0.05, 0.05, next(seeds))
    embedding = keras.layers.ReversibleEmbedding(256, width, embeddings_initializer=first, name="bytes_embedding")
    x = embedding(tokens) * math.sqrt(width)  # (B, T, D)
    for block in range(blocks):
        parts = ops.split(layer(3 * width, f"block{block}_qkv")(x), 3, axis=-1)  # 3 of (B, T, D)
        query, key, value = (ops.reshape(part, (-1, context, heads, width // heads)) for part in parts)
        mixed = ops.dot_product_attention(_rotated(query), _rotated(key), value, is_causal=True)  # (B, T, N, H)
        x = x + layer(width, f"block{block}_output")(ops.reshape(mixed, (-1, context, width)))
        hidden = ops.square(ops.relu(layer(4 * width, f"block{block}_up")(x)))  # (B, T, 4 D)
        x = x + layer(width, f"block{block}_down")(hidden)
    x = keras.layers.RMSNormalization(name="final_norm")(x)
    return keras.Model(tokens, embedding(x, reverse=True))


def _rotated(x):
    """Rotary positions (lesson 04) for queries or keys (B, T, N, H): pair i turns by t · 10,000^(−2i/H) radians."""
    half, places = x.shape[-1] // 2, np.arange(x.shape[1], dtype="float32")
    angles = (places[:, None] * 10_000.0 ** (-np.arange(half) / half))[:, None]  # (T, 1, H/2)
    cos, sin = np.cos(angles).astype("float32"), np.sin(angles).astype("float32")
    first, second = x[..., :half], x[..., half:]
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def train(
    model: keras.Model,
    text: np.ndarray,
    steps: int,
    learning_rate: float,
    batch: int = 16,
    seed: int = 0,
    after_step: Callable[[int, float], None] | None = None,
) -> np.ndarray:
    """Trains a byte model on random windows of a text with Adam: warm-up over a tenth of the steps, then a cosine to 0.

    The windows depend on `seed` and the step alone, so two models with one seed see the same bytes in the same order.

    Args:
        model: From `byte_transformer`.
        text: (bytes,) uint8.
        steps, batch: Integers, optimizer steps and windows a step.
        learning_rate: Float, at the peak.
        seed: Integer.
        after_step: Called with the number of steps done and the loss.

    Returns:
        (steps,) losses in bits a byte.

    Raises:
        ValueError: If the text is shorter than one window.

    Example:

    >>> from gemma_lora.layers.bitnet import NormLinear
    >>> model = byte_transformer(NormLinear, width=8, blocks=1, heads=2, context=8)
    >>> len(train(model, np.arange(100, dtype="uint8"), steps=2, learning_rate=1e-3, batch=2))
    2
    """
    context = _context_of(model, text)
    warm_up = max(1, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate / warm_up, max(1, steps - warm_up), warmup_target=learning_rate, warmup_steps=warm_up
    )
    optimizer = keras.optimizers.Adam(schedule, beta_2=0.98, global_clipnorm=1.0)
    optimizer.build(model.trainable_variables)
    step = jax.jit(functools.partial(_step, model, optimizer))
    trained = [variable.value for variable in model.trainable_variables]
    fixed = [variable.value for variable in model.non_trainable_variables]
    state = [variable.value for variable in optimizer.variables]
    rng, losses = np.random.default_rng(seed), np.zeros(steps)
    for done in range(steps):
        starts = rng.integers(0, len(text) - context, batch)
        windows = text[starts[:, None] + np.arange(context + 1)].astype("int32")  # (B, T + 1)
        trained, state, loss = step(trained, state, fixed, windows)
        losses[done] = float(loss) / math.log(2)
        for variable, value in zip(model.trainable_variables, trained, strict=True):
            variable.assign(value)  # so that a look at the model shows this step's weights
        if after_step is not None:
            after_step(done + 1, losses[done])
    return losses


def _context_of(model: keras.Model, text: np.ndarray) -> int:
    """Bytes in the model's window, once the text is found to be longer."""
    context = model.input_shape[1]
    if len(text) <= context:
        raise ValueError(f"`text` must be longer than a window of {context} bytes. Received: {len(text)} bytes")
    return context


def _step(model, optimizer, trained, state, fixed, windows):
    """One optimizer step: weights and optimizer state before -> after, and the mean loss in nats."""
    loss, gradients = jax.value_and_grad(lambda weights: _nats(model, weights, fixed, windows).mean())(trained)
    trained, state = optimizer.stateless_apply(state, gradients, trained)
    return trained, state, loss


def _nats(model, trained, fixed, windows):
    """(B, T) losses in nats of (B, T + 1) bytes."""
    logits, _ = model.stateless_call(trained, fixed, windows[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None], axis=-1)
    return -chosen[..., 0]


def bits_per_byte(model: keras.Model, text: np.ndarray, batch: int = 32) -> float:
    """Mean loss of a byte model over a text, cut into windows side by side.

    Each byte is predicted once, from the bytes before it in its window (a window's first byte from the last byte of the
    window before alone). What does not fill a window at the end is left out.

    Args:
        model: From `byte_transformer`, or any model (B, T) -> (B, T, 256).
        text: (bytes,) uint8, longer than one window.
        batch: Integer, windows at a time.

    Returns:
        Float, −log2 of the probability of the byte that came, averaged.

    Raises:
        ValueError: If the text is not longer than one window.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Embedding(256, 256, "zeros")])
    >>> round(bits_per_byte(model, np.arange(9, dtype="uint8")), 4)  # 256 bytes equally likely
    8.0
    """
    context = _context_of(model, text)
    count = (len(text) - 1) // context
    windows = np.stack([text[i * context : (i + 1) * context + 1] for i in range(count)]).astype("int32")
    score = jax.jit(functools.partial(_nats, model))
    weights = [[v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)]
    total = sum(float(score(*weights, windows[i : i + batch]).sum()) for i in range(0, count, batch))
    return total / (count * context) / math.log(2)


def write_on(model: keras.Model, prompt: str, count: int, temperature: float = 0.7, seed: int = 0) -> str:
    """Lets a byte model continue a text, a byte at a time.

    Args:
        model: From `byte_transformer`.
        prompt: What it continues; of a longer prompt it sees the last `context` bytes.
        count: Integer, bytes to add.
        temperature: Float above 0: logits are divided by it before a byte is drawn. Lower is less varied.
        seed: Integer.

    Returns:
        The prompt and what follows.

    Example:

    >>> model = byte_transformer(keras.layers.Dense, width=8, blocks=1, heads=2, context=8)
    >>> len(write_on(model, "for ", count=3).encode(errors="replace")) >= 7
    True
    """
    context = model.input_shape[1]
    rng = np.random.default_rng(seed)
    read = jax.jit(lambda tokens: model(tokens, training=False))
    text = list(prompt.encode())
    for _ in range(count):
        window = text[-context:]
        padded = np.array([window + [0] * (context - len(window))], "int32")  # what stands behind is not looked at
        logits = np.asarray(read(padded))[0, len(window) - 1] / temperature
        # The largest logit plus Gumbel noise is a draw from their softmax.
        text.append(int(np.argmax(logits + rng.gumbel(size=256))))
    return bytes(text).decode(errors="replace")
