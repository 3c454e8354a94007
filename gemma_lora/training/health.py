"""Checks that a training is the training you mean: each does something to it and looks at what follows.

A loss that falls says little: it falls for wrong gradients, for targets that nobody wanted and for layers that should
have been frozen. These functions take a Keras model and one batch as `fit` takes it, `(x, y)` or
`(x, y, sample_weight)`, and give the model back as it was: weights, optimizer and random states. `FineTuner` and any
other `keras.Model` will do; from a KerasHub model take the preprocessor off first (`model.preprocessor = None`), since
the batch is arrays.

None of them proves a training right. `gradient_is_right`, for instance, cannot see a part of the gradient that is
missing altogether (`trains_what_it_should` does). They catch what lesson 12 shows, and are cheap: a few steps each.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_lora.base.keras_on_jax import keras
from gemma_lora.lora.apply import lora_layers, trained_weights
from gemma_lora.training.steps import SteppedModel

#: `(x, y)` or `(x, y, sample_weight)`; x is an array or a dictionary of arrays.
Batch = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        check: The check's name.
        fine: Whether it found nothing wrong.
        says: What it measured, or what is wrong.
    """

    check: str
    fine: bool
    says: str

    def __str__(self) -> str:
        return f"{'✓' if self.fine else '✗'} {self.check}: {self.says}"


#: The loss of a batch that the model overfits, in nats per token: the right token has 95 percent.
_OVERFITTED = 0.05
#: A loss below this is too small, in float32, to tell what changes it; in nats per token.
_SMALL = 1e-3


@contextlib.contextmanager
def _given_back(model: keras.Model) -> Iterator[None]:
    """Within, the model may be trained; afterwards its variables and the optimizer's are as before.

    A `FineTuner` without an optimizer of the caller's trains at its constant rate: the schedule of a `fit` that is over
    stands at zero.
    """
    with model.trial() if isinstance(model, SteppedModel) else contextlib.nullcontext():
        if isinstance(model, SteppedModel):
            model.build_optimizer()
        elif not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        variables = [*model.variables, *model.optimizer.variables]
        before = [np.array(variable.value) for variable in variables]
        try:
            yield
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)


def _parts(batch: Batch) -> tuple[Any, Any, Any]:
    """`(x, y, sample_weight)`, with None for weights that are not given."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise ValueError(f"`batch` must be (x, y) or (x, y, sample_weight). Received: {type(batch).__name__}")
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def _loss(model: keras.Model, batch: Batch) -> float:
    return float(model.test_on_batch(*batch, return_dict=True)["loss"])


def _step(model: keras.Model, batch: Batch) -> None:
    """One optimizer step, of as many times the batch as the model's steps are made of."""
    own = model.optimizer.gradient_accumulation_steps or 1
    for _ in range(max(own, getattr(model, "settings", {}).get("accumulate", 1))):
        model.train_on_batch(*batch)


def what_moves(model: keras.Model, batch: Batch, steps: int = 3) -> dict[str, float]:
    """Which weights a training changes, and how much of each: the share of its numbers that are others afterwards.

    Args:
        model: A compiled model.
        batch: `(x, y, sample_weight)`.
        steps: Integer, training steps. LoRA needs two before A moves: at first B is zero, and so is A's gradient.

    Returns:
        `{the weight's path: share between 0 and 1}`, all weights, frozen ones too. A path that occurs twice has its
        number behind it.
    """
    with _given_back(model):
        before = [np.array(weight.value) for weight in model.weights]
        for _ in range(steps):
            _step(model, batch)
        shares = [
            float(np.mean(np.asarray(weight.value) != old)) for weight, old in zip(model.weights, before, strict=True)
        ]
    return dict(zip(_paths(model.weights), shares, strict=True))


def _paths(weights: list) -> list[str]:
    seen: dict[str, int] = {}
    paths = []
    for weight in weights:
        seen[weight.path] = seen.get(weight.path, 0) + 1
        paths.append(weight.path if seen[weight.path] == 1 else f"{weight.path} ({seen[weight.path]})")
    return paths


def trains_what_it_should(
    model: keras.Model, batch: Batch, should: Callable[[str], bool] | None = None, steps: int = 3
) -> Finding:
    """Whether the weights that change are those that should.

    Args:
        model, batch, steps: As in `what_moves`.
        should: Tells of a weight's path whether training is to change it. By default, LoRA's A and B and DoRA's
            magnitude where the model has any (`lora` in a weight's own name), with the layers that `apply_lora` was
            told to `train`; Houlsby's adapters where it has those; otherwise all weights but statistics, such as those
            of `Normalization`, which may move or not.

    Returns:
        A `Finding`. It names weights that should move and do not, weights that move and should not, and 16-bit weights
        of which most numbers stand still, because their steps are smaller than the distance to the next number.
    """
    shares = what_moves(model, batch, steps)
    if should is None:
        should, either = _default(model, shares)
        shares = {path: share for path, share in shares.items() if path not in either}
    wrong = []
    if not any(should(path) for path in shares):
        wrong.append("there is nothing of what should move")
    if still := [path for path, share in shares.items() if should(path) and not share]:
        wrong.append(f"{_some(still)} should move and does not")
    if astray := [path for path, share in shares.items() if not should(path) and share]:
        wrong.append(f"{_some(astray)} moves and should not")
    kinds = dict(zip(_paths(model.weights), (str(weight.dtype) for weight in model.weights), strict=True))
    coarse = [path for path, share in shares.items() if 0 < share < 0.5 and kinds[path] in ("bfloat16", "float16")]
    if coarse:
        wrong.append(f"most numbers of {_some(coarse)} stand still in {kinds[coarse[0]]}")
    moving = sum(1 for share in shares.values() if share)
    says = "; ".join(wrong) or f"{moving} of {len(shares)} weights move, as they should"
    return Finding("trains what it should", not wrong, says)


def _default(model: keras.Model, paths: Iterable[str]) -> tuple[Callable[[str], bool], set[str]]:
    """What should move if nobody says it, and the paths of weights that may move or not."""
    weights = dict(zip(paths, model.weights, strict=True))
    if any(_is_lora(path) for path in weights):
        trained = {id(weight) for weight in trained_weights(model)}
        return lambda path: _is_lora(path) or id(weights[path]) in trained, set()
    if any(map(_is_bottleneck, weights)):
        return _is_bottleneck, set()
    # Keras keeps what a layer made as no weight to train apart, whatever has been frozen since.
    statistics = {id(weight) for layer in model._flatten_layers() for weight in layer._non_trainable_variables}
    return lambda path: True, {path for path, weight in weights.items() if id(weight) in statistics}


def _is_lora(path: str) -> bool:
    """Whether a weight is LoRA's, Keras's own or ours, or DoRA's magnitude."""
    name = path.rsplit("/", 1)[-1].split(" ")[0]
    return "lora" in name or name == "magnitude"


def _is_bottleneck(path: str) -> bool:
    return path.rsplit("/", 1)[-1].split(" ")[0] in ("down_kernel", "down_bias", "up_kernel", "up_bias")


def _some(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more)"


def loss_and_gradient(model: keras.Model, batch: Batch) -> tuple[Callable[[list], jax.Array], list[jax.Array]]:
    """The loss as a function of the trainable weights, and its gradient at the present ones; dropout is off.

    Returns:
        `(loss, gradient)`: a compiled function of a list of arrays, one for each trainable weight, and such a list.
    """
    x, y, weights = _parts(batch)
    fixed = [variable.value for variable in model.non_trainable_variables]
    metrics = [variable.value for variable in model.metrics_variables]

    @jax.jit
    def loss(trainable):
        return model.compute_loss_and_updates(trainable, fixed, metrics, x, y, weights, training=False)[0]

    return loss, jax.jit(jax.grad(loss))([variable.value for variable in model.trainable_variables])


def slope_ratio(model: keras.Model, batch: Batch, change: float = 0.02) -> float:
    """How steep the loss is along its gradient, measured, as a share of what the gradient says: 1 if it is right.

    Walking ε against and along g / |g|, the loss must change by 2 ε |g|, where g is the gradient. ε is such that each
    walk should change the loss by the share `change` of it.

    Args:
        model: A compiled model in float32; in 16 bits the loss is too coarse for a difference.
        batch: `(x, y, sample_weight)`.
        change: Float, a small share.

    Returns:
        Float; nan if the gradient is zero. DoRA's A and B are left out of g: it stops a part of their gradient on
        purpose.
    """
    loss, gradient = loss_and_gradient(model, batch)
    stopped = {id(factor) for layer in lora_layers(model) if layer.dora for factor in (layer.lora_a, layer.lora_b)}
    pairs = zip(model.trainable_variables, gradient, strict=True)
    gradient = [jnp.zeros_like(part) if id(variable) in stopped else part for variable, part in pairs]
    present = [variable.value for variable in model.trainable_variables]
    length = float(jnp.sqrt(sum(jnp.sum(jnp.square(part.astype("float32"))) for part in gradient)))
    if not length:
        return float("nan")
    step = change * float(loss(present)) / length

    def at(sign: float) -> float:
        return float(loss([w + sign * step * g / length for w, g in zip(present, gradient, strict=True)]))

    return (at(1.0) - at(-1.0)) / (2 * step * length)


def gradient_is_right(model: keras.Model, batch: Batch, tolerance: float = 0.2) -> Finding:
    """Whether the loss rises along its gradient as steeply as the gradient says: see `slope_ratio`."""
    if (loss := _loss(model, batch)) < _SMALL:
        return Finding("gradient is right", True, f"the loss, {loss:.2g}, is too small to measure a slope")
    ratio = slope_ratio(model, batch)
    if np.isnan(ratio):
        return Finding("gradient is right", False, "it is zero everywhere")
    says = f"the loss changes {ratio:.2f} times as fast as the gradient says"
    return Finding("gradient is right", abs(ratio - 1) <= tolerance, says)


def overfits_one_batch(
    model: keras.Model, batch: Batch, steps: int = 100, to: float = 0.2, rounds: int = 10
) -> Finding:
    """Whether training on this batch alone brings its loss down to a share of what it was.

    A model that cannot overfit a few examples has something in its way. (Or too small a learning rate, or too
    few steps: then the loss has come down part of the way. Frozen embeddings and a frozen last norm bound the logits,
    and so the loss from below.) A batch that it overfits already, after a training, passes.

    Args:
        model: A compiled model.
        batch: `(x, y, sample_weight)`, a few examples.
        steps: Integer, training steps in a round.
        to: Float, the share that must be reached.
        rounds: Integer, the most rounds. There is another one while the share is not reached and the last round has
            brought the loss down by a hundredth or more.
    """
    before = after = _loss(model, batch)
    taken = 0
    with _given_back(model):
        enough = max(to * before, _OVERFITTED)
        for _ in range(rounds):
            last = after
            for _ in range(steps):
                _step(model, batch)
            after, taken = _loss(model, batch), taken + steps
            if after <= enough or not after < 0.99 * last:
                break
    return Finding("overfits one batch", after <= enough, f"{before:.3g} becomes {after:.3g} in {taken} steps")


def evaluates_alike(model: keras.Model, batch: Batch) -> Finding:
    """Whether evaluating twice gives one loss: with dropout at work it does not."""
    first, second = _loss(model, batch), _loss(model, batch)
    says = f"loss {first:.4g} both times" if first == second else f"loss {first:.4g}, then {second:.4g}"
    return Finding("evaluates alike", first == second, says)


def padding_is_free(model: keras.Model, batch: Batch, extra: int = 8, tolerance: float = 1e-3) -> Finding:
    """Whether the loss stays what it is when every row gets more padding.

    It does not if the mean is over positions and not over those with a weight, or if padding is attended to.

    Args:
        model: A compiled model over rows of any length, (B, T, …).
        batch: `(x, y, sample_weight)` with T on axis 1 of x; arrays without it, such as a label per row, stay as they
            are. 0 is padding.
        extra: Integer, positions to add.
        tolerance: Float, relative.
    """
    length = np.shape(jax.tree.leaves(batch[0])[0])[1]

    def longer(array):
        array = np.asarray(array)
        if array.shape[1:2] != (length,):
            return array
        return np.pad(array, [(0, 0), (0, extra)] + [(0, 0)] * (array.ndim - 2))

    before = _loss(model, batch)
    after = _loss(model, jax.tree.map(longer, batch))
    says = f"loss {before:.4g}, with {extra} more places of padding {after:.4g}"
    return Finding("padding is free", abs(after - before) <= tolerance * max(abs(before), _SMALL), says)


def neighbours_are_unseen(model: keras.Model, batch: Batch, tolerance: float = 1e-4) -> Finding:
    """Whether an example in a packed row is read as if it were alone.

    The loss of each row's last example must not change when the tokens of the others do.

    Args:
        model: A compiled model over `{"token_ids", "padding_mask"}`, (B, T) each.
        batch: Its padding mask holds 1, 2, … for a row's examples and 0 for padding.
        tolerance: Float, relative.

    Raises:
        ValueError: If no row holds two examples.
    """
    x, y, weights = _parts(batch)
    weights = np.ones(np.shape(y)) if weights is None else weights
    tokens, segments = np.asarray(x["token_ids"]), np.asarray(x["padding_mask"]).astype(int)
    last = segments.max(axis=1, keepdims=True)
    if last.max() < 2:
        raise ValueError("`padding_mask` must hold 1, 2, … for the examples of a row. No row of this batch has two.")
    weights = np.where(segments == last, weights, 0)
    others = np.where((segments > 0) & (segments < last), np.roll(tokens, 1, axis=1), tokens)
    before = _loss(model, (x, y, weights))
    after = _loss(model, (x | {"token_ids": others}, y, weights))
    says = f"loss of each row's last example {before:.4g}, after others instead of its neighbours {after:.4g}"
    return Finding("neighbours are unseen", abs(after - before) <= tolerance * max(abs(before), _SMALL), says)


def _has_padding(x: Any, y: Any, weights: Any) -> bool:
    """Whether a batch's rows are tokens that more padding may follow, and not, say, the features of a classifier."""
    if isinstance(x, dict) and "padding_mask" in x:
        return True
    tokens = jax.tree.leaves(x)[0]
    if not np.issubdtype(np.asarray(tokens).dtype, np.integer) and np.ndim(weights) < 2:
        return False
    targets = [np.shape(array)[1:2] for array in (y, weights) if array is not None]
    return np.ndim(tokens) >= 2 and np.shape(tokens)[1:2] in targets


def pieces(batch: Batch, tokenizer: Any) -> list[list[tuple[str, bool]]]:
    """A batch's tokens as strings, each with whether it carries loss: what the model is really taught.

    Args:
        batch: `({"token_ids", …}, y, sample_weight)`, (B, T) each; `y[:, t]` is the token after `token_ids[:, t]`.
        tokenizer: With `id_to_token(id)`.

    Returns:
        A list a row of `(token, whether it carries loss)`, to the last token that is read or carries loss. Where loss
        is carried the target stands, elsewhere the token that is read.
    """
    x, y, weights = _parts(batch)
    weights = np.ones(np.shape(y)) if weights is None else weights
    tokens, targets, weights = np.asarray(x["token_ids"]), np.asarray(y), np.asarray(weights)
    read = np.asarray(x.get("padding_mask", tokens != 0)).astype(bool)
    after = np.concatenate([read[:, 1:], np.zeros_like(read[:, :1])], axis=1)  # whether the next token is read
    rows = []
    for row in range(len(tokens)):
        found = [(int(tokens[row, 0]), False)]
        ends = np.flatnonzero(after[row] | (weights[row] > 0))
        for place in range(int(ends[-1]) + 1 if len(ends) else 0):
            carries = bool(weights[row, place] > 0)
            found.append((int(targets[row, place] if carries else tokens[row, place + 1]), carries))
        rows.append([(str(tokenizer.id_to_token(number)), carries) for number, carries in found])
    return rows


def read_back(batch: Batch, tokenizer: Any) -> list[str]:
    """A batch as text, a string a row, with what carries loss in ⟦brackets⟧; ▁ is a space. See `pieces`."""
    rows = []
    for row in pieces(batch, tokenizer):
        text, inside = "", False
        for piece, carries in row:
            text += ("⟦" if carries else "⟧") if carries != inside else ""
            text, inside = text + piece, carries
        rows.append(text + ("⟧" if inside else ""))
    return rows


def check(model: keras.Model, batch: Batch, should: Callable[[str], bool] | None = None) -> list[Finding]:
    """Runs all checks that a batch allows: `for finding in check(model, batch): print(finding)`.

    Args:
        model: A compiled model.
        batch: `(x, y)` or `(x, y, sample_weight)`. Padding is looked at in rows of tokens (B, T): those with a padding
            mask, or with a target or a weight per token. Neighbours are where the padding mask numbers them.
        should: As in `trains_what_it_should`.
    """
    found = [
        trains_what_it_should(model, batch, should),
        gradient_is_right(model, batch),
        overfits_one_batch(model, batch),
        evaluates_alike(model, batch),
    ]
    x, y, weights = _parts(batch)
    if _has_padding(x, y, weights):
        found.append(padding_is_free(model, batch))
    if isinstance(x, dict) and np.max(x.get("padding_mask", 0)) > 1:
        found.append(neighbours_are_unseen(model, batch))
    return found
