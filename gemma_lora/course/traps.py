"""Where a training with Keras, KerasHub or JAX goes wrong without a word, each reproduced in a second or two.

Lesson 12 shows them; `python -m gemma_lora.course.traps` tries them all on the installed versions and prints which are
still there. A trap is a function without arguments that returns True while the library does the surprising thing, and
False once it does not, or refuses (`make latest` runs them on the newest releases). They stand in the package and not
among the tests, because the lesson is read where there are no tests: after `pip install`, on Colab.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemma_lora.base.keras_on_jax import keras
from gemma_lora.base.lazy_tensorflow import quiet_stderr
from gemma_lora.gemma.load import import_keras_hub
from gemma_lora.training import health


@dataclasses.dataclass(frozen=True)
class Trap:
    """A surprise of a library.

    Args:
        name: The function's name.
        where: The library's function.
        what: What happens without a word.
        still_there: Tries it: True while it happens.
    """

    name: str
    where: str
    what: str
    still_there: Callable[[], bool]


TRAPS: dict[str, Trap] = {}


def _trap(where: str, what: str):
    def register(function: Callable[[], bool]) -> Callable[[], bool]:
        TRAPS[function.__name__] = Trap(function.__name__, where, what, function)
        return function

    return register


# --- something small to try them on ------------------------------------------------------------------------

#: What the tokenizer knows: a character a token.
_LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:;?!+-=<>_/"


@functools.cache
def tiny_tokenizer(generation: int = 3):
    """A KerasHub Gemma tokenizer with a character a token, made by SentencePiece.

    As in Gemma's own file `<pad>`, `<eos>` and `<bos>` are control tokens, which no text brings in; `<start_of_turn>`
    and `<end_of_turn>` are user-defined: one token wherever a text has them.
    """
    import sentencepiece

    hub = import_keras_hub()
    written = io.BytesIO()
    with quiet_stderr():  # SentencePiece tells how it trains
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([_LETTERS] * 4),
            model_writer=written,
            model_type="char",
            vocab_size=len({*_LETTERS}) + 6,
            character_coverage=1.0,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            bos_piece="<bos>",
            eos_piece="<eos>",
            user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
            minloglevel=2,
        )
        if generation == 3:
            return hub.tokenizers.Gemma3Tokenizer(proto=written.getvalue(), has_vision_tokens=False)
        return hub.tokenizers.GemmaTokenizer(proto=written.getvalue())


def tiny_gemma(seed: int = 0, vocabulary_size: int = 96, width: int = 32, layers: int = 2, **backbone):
    """KerasHub's Gemma 3 as it is, two blocks small, with random weights: a `CausalLM` without preprocessor."""
    hub = import_keras_hub()
    keras.utils.set_random_seed(seed)
    small = {
        "vocabulary_size": vocabulary_size,
        "image_size": 16,
        "num_layers": layers,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": width,
        "intermediate_dim": 2 * width,
        "head_dim": width // 4,
        "dtype": "float32",
    }
    return hub.models.Gemma3CausalLM(preprocessor=None, backbone=hub.models.Gemma3Backbone(**(small | backbone)))


def tiny_network(dtype: str = "float32", seed: int = 0) -> keras.Model:
    """Two `Dense` layers with a norm between them, 8 numbers in and 4 out."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu", name="first", dtype=dtype),
            keras.layers.LayerNormalization(name="norm", dtype=dtype),
            keras.layers.Dense(4, name="second", dtype=dtype),
        ],
        name="tiny",
    )


def random_rows(rows: int = 4, length: int = 12, vocabulary_size: int = 96, seed: int = 0) -> health.Batch:
    """Random tokens as KerasHub takes them; loss on the second half of each row."""
    ids = np.random.default_rng(seed).integers(6, vocabulary_size, (rows, length + 1)).astype("int32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((rows, length), "int32")}
    return x, ids[:, 1:], (np.arange(length) >= length // 2).astype("float32") * np.ones((rows, 1), "float32")


def _set_lora(model: keras.Model, seed: int = 0) -> None:
    """Gives every A and B random numbers: a model that has been trained."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "lora_kernel" in weight.path:
            weight.assign(rng.normal(0, 0.3, weight.shape))


def _lora_weights(model: keras.Model) -> list[keras.Variable]:
    return [weight for weight in model.weights if "lora_kernel" in weight.path]


def _logits(model: keras.Model, batch: health.Batch) -> np.ndarray:
    return np.asarray(model(batch[0], training=False))


def _compiled(model: keras.Model, **more: Any) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(**({"optimizer": keras.optimizers.Adam(1e-3), "loss": loss, "weighted_metrics": []} | more))
    return model


# --- what is trained ---------------------------------------------------------------------------------------


@_trap("keras.layers.Dense.enable_lora", "freezes its own kernel and nothing else")
def the_rest_is_trained() -> bool:
    """LoRA on every `Dense` leaves biases and norms trainable, LoRA on one leaves the other's kernel."""
    model = tiny_network()
    model.get_layer("first").enable_lora(2)
    return any("lora" not in weight.path for weight in model.trainable_weights)


@_trap("keras_hub Backbone.enable_lora", "passes over names that no layer has")
def a_misspelt_target() -> bool:
    """Of `["query", "vlaue"]` only the queries get LoRA."""
    model = tiny_gemma()
    try:
        model.backbone.enable_lora(2, target_layer_names=["query", "vlaue"])
    except ValueError:
        return False
    return len(_lora_weights(model)) == 2 * 2


@_trap("keras.Model.load_weights", "sets LoRA's A and B to zero, from where no gradient moves them")
def loading_stops_lora() -> bool:
    """Training after a resume: both factors are zero, so both gradients are."""
    model = tiny_network()
    model.get_layer("first").enable_lora(2)
    _set_lora(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_weights(f"{folder}/run.weights.h5")
        model.load_weights(f"{folder}/run.weights.h5")
    return not any(np.any(np.asarray(weight)) for weight in _lora_weights(model))


@_trap("keras optimizers on bfloat16 weights", "round small steps to nothing")
def bfloat16_swallows_steps() -> bool:
    """Ten steps of SGD at 0.001 leave most numbers of a kernel where they were."""
    return _moves_in_bfloat16(keras.optimizers.SGD(0.001)) < 0.5


@_trap("keras.optimizers.Adam on bfloat16 weights", "moves nothing at any rate: beta_2 = 0.999 rounds to 1")
def adam_stands_still_in_bfloat16() -> bool:
    """Its step has a factor 1 - beta_2^t, computed in the weights' type, where it is 0."""
    return _moves_in_bfloat16(keras.optimizers.Adam(0.01)) == 0


def _moves_in_bfloat16(optimizer: keras.Optimizer) -> float:
    model, rng = tiny_network("bfloat16"), np.random.default_rng(0)
    model.compile(optimizer, "mse")
    batch = rng.normal(size=(16, 8)), rng.normal(size=(16, 4)), None
    return health.what_moves(model, batch, steps=10)["tiny/first/kernel"]


@_trap("keras.initializers", "one initializer object starts every layer of a shape with the same numbers")
def one_initializer_twice() -> bool:
    """Two heads that begin alike and, with one input and one loss, remain alike."""
    initializer = keras.initializers.HeUniform()
    one, other = (keras.layers.Dense(4, kernel_initializer=initializer) for _ in range(2))
    for layer in (one, other):
        layer.build((None, 8))
    return bool(np.array_equal(np.asarray(one.kernel), np.asarray(other.kernel)))


# --- whether the gradient is right -------------------------------------------------------------------------


@_trap("keras quantize('int8') with a tied embedding", "passes no gradient through the rounded activations")
def int8_gradient() -> bool:
    """LoRA's gradient in an int8 Gemma points elsewhere than in the float one: cosine below a half."""
    gradients = []
    for mode in (None, "int8"):
        model = tiny_gemma()
        if mode:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that norms and the like stay as they are
                model.backbone.quantize(mode)
        model.backbone.enable_lora(4)
        _set_lora(model)
        _, gradient = health.loss_and_gradient(_compiled(model), random_rows())
        gradients.append(np.concatenate([np.ravel(part) for part in gradient]))
    one, other = gradients
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)) < 0.5


# --- what is in the batch ----------------------------------------------------------------------------------


@_trap("keras_hub GemmaCausalLMPreprocessor (Gemma 1 and 2)", "gives the prompt loss, there is no way to mask it")
def the_prompt_carries_loss() -> bool:
    """It takes whole texts only, and weighs every token of them."""
    hub = import_keras_hub()
    preprocessor = hub.models.GemmaCausalLMPreprocessor(tiny_tokenizer(1), sequence_length=24)
    try:
        _, _, weights = preprocessor({"prompts": ["2+2="], "responses": ["4"]})
    except (ValueError, TypeError, KeyError):
        _, _, weights = preprocessor(["2+2=4"])
    return bool(np.asarray(weights)[0, 0])


@_trap("keras_hub tokenizers", "read <bos> or <eos> that stands in a text as plain letters")
def a_control_token_is_text() -> bool:
    """`<eos>` at the end of an answer is not the token of that name: the model learns to write five letters."""
    tokenizer = tiny_tokenizer()
    turns = tokenizer.token_to_id("<start_of_turn>") in np.asarray(tokenizer("<start_of_turn>user")).tolist()
    return turns and tokenizer.end_token_id not in np.asarray(tokenizer("four<eos>")).tolist()


@_trap("keras_hub Gemma3CausalLMPreprocessor", "cuts the answer of a long prompt and still puts <eos> behind it")
def the_answer_is_cut() -> bool:
    """Truncation takes from both in turn: the model learns to stop in the middle."""
    hub = import_keras_hub()
    preprocessor = hub.models.Gemma3CausalLMPreprocessor(tiny_tokenizer(), sequence_length=16)
    batch = preprocessor({"prompts": ["the prompt is too long"], "responses": ["an answer"]})
    return "answer" not in health.read_back(batch, tiny_tokenizer())[0]


@_trap("keras_hub Gemma3Backbone", "reads segment ids in the padding mask as ones: packed examples see each other")
def packed_rows_leak() -> bool:
    """Other tokens in a row's first example change the hidden states of its second."""
    model, x = tiny_gemma(), random_rows(rows=1)[0]
    x["padding_mask"] = np.array([[1] * 6 + [2] * 6], "int32")
    others = x | {"token_ids": np.where(x["padding_mask"] == 1, 7, x["token_ids"])}
    one, other = (np.asarray(model.backbone(inputs))[0, 6:] for inputs in (x, others))
    return not np.allclose(one, other, atol=1e-4)


# --- what a number counts ----------------------------------------------------------------------------------


@_trap("keras losses with sample_weight", "divide by all positions, those without weight too")
def the_mean_counts_padding() -> bool:
    """A quarter of the positions with weight: a quarter of the loss."""
    logits, targets = np.zeros((1, 8, 4), "float32"), np.zeros((1, 8), "int32")
    weights = np.array([[1, 1, 0, 0, 0, 0, 0, 0]], "float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(targets, logits, sample_weight=weights)
    return bool(np.isclose(float(loss), np.log(4) / 4, atol=1e-4))


@_trap("keras.Model.compile(metrics=…)", "counts padding: only weighted_metrics sees the weights")
def accuracy_counts_padding() -> bool:
    """One answer token wrong, three places of padding right: 75 % correct."""
    model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(8, 8, "zeros")])
    model.compile(loss="sparse_categorical_crossentropy", metrics=["sparse_categorical_accuracy"])
    targets, weights = np.array([[3, 0, 0, 0]]), np.array([[1.0, 0, 0, 0]])
    measured = model.test_on_batch(np.zeros((1, 4), "int32"), targets, weights, return_dict=True)
    return float(measured["sparse_categorical_accuracy"]) > 0.5


@_trap("keras.losses.SparseCategoricalCrossentropy", "takes any target, -100 too, as a token that costs nothing")
def a_target_that_is_no_token() -> bool:
    """Loss 0 and no error; it still counts as a position."""
    logits = np.zeros((1, 2, 4), "float32")
    try:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(np.array([[1, -100]]), logits)
    except ValueError:
        return False
    return bool(np.isclose(float(loss), np.log(4) / 2, atol=1e-4))


@_trap("keras predict and fit under JAX", "go on with a Python number as it was at their first call")
def a_number_is_baked_in() -> bool:
    """`lora_alpha = 0` switches the adapter off in `model(x)` and not in `model.predict(x)`."""
    model, x = tiny_network(), np.ones((2, 8), "float32")
    layer = model.get_layer("first")
    layer.enable_lora(2)
    _set_lora(model)
    before = model.predict(x, verbose=0)
    layer.lora_alpha = 0
    return bool(np.array_equal(before, model.predict(x, verbose=0))) and not np.allclose(before, np.asarray(model(x)))


# --- what is saved -----------------------------------------------------------------------------------------


@_trap("keras_hub save_lora_weights", "does not store which layers: other targets than the default are lost on loading")
def an_adapter_loses_layers() -> bool:
    """Saved with LoRA on query, key and value; loaded into query and value."""
    batch, trained, again = random_rows(), tiny_gemma(), tiny_gemma()
    trained.backbone.enable_lora(2, target_layer_names=["query", "key", "value"])
    _set_lora(trained)
    with tempfile.TemporaryDirectory() as folder:
        trained.backbone.save_lora_weights(f"{folder}/my.lora.h5")
        try:
            again.backbone.load_lora_weights(f"{folder}/my.lora.h5")
        except (ValueError, KeyError):
            return False
    return not np.allclose(_logits(trained, batch), _logits(again, batch), atol=1e-3)


@_trap("keras.Model.save_weights", "merges LoRA in; with the adapter loaded on top the update counts twice")
def merged_twice() -> bool:
    """Weights file and adapter file of one training, both loaded."""
    batch, trained, again = random_rows(), tiny_gemma(), tiny_gemma()
    trained.backbone.enable_lora(2)
    _set_lora(trained)
    with tempfile.TemporaryDirectory() as folder:
        trained.save_weights(f"{folder}/all.weights.h5")
        trained.backbone.save_lora_weights(f"{folder}/my.lora.h5")
        again.load_weights(f"{folder}/all.weights.h5")
        again.backbone.load_lora_weights(f"{folder}/my.lora.h5")
    return not np.allclose(_logits(trained, batch), _logits(again, batch), atol=1e-3)


@_trap("keras.saving.load_model", "forgets lora_alpha: it is the rank again")
def alpha_is_forgotten() -> bool:
    """Saved with alpha 16 at rank 2."""
    model = tiny_network()
    model.get_layer("first").enable_lora(2, lora_alpha=16)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        return keras.saving.load_model(f"{folder}/model.keras").get_layer("first").lora_alpha != 16


@_trap("keras_hub export_to_transformers", "leaves LoRA out")
def the_export_has_no_lora() -> bool:
    """The exported query kernel is the base model's."""
    from safetensors.numpy import load_file

    kernels = []
    for adapted in (False, True):
        model = tiny_gemma()
        if adapted:
            model.backbone.enable_lora(2)
            _set_lora(model)
        with tempfile.TemporaryDirectory() as folder:
            model.backbone.export_to_transformers(folder)
            tensors = load_file(Path(folder) / "model.safetensors")
        kernels.append(next(tensor for name, tensor in tensors.items() if "q_proj" in name))
    return bool(np.array_equal(kernels[0], kernels[1]))


# --- all of them -------------------------------------------------------------------------------------------


def try_all() -> dict[str, bool | str]:
    """`{trap: whether it is still there}`, or the error that trying it raised, as text."""
    import_keras_hub()  # before Keras imports TensorFlow, whose start-up lines are turned away there
    found: dict[str, bool | str] = {}
    for name, trap in TRAPS.items():
        try:
            found[name] = trap.still_there()
        except Exception as error:  # another release, another interface: that is news too
            first = (str(error).strip().splitlines() or [""])[0]
            found[name] = f"{type(error).__name__}: {first}"[:120]
    return found


def versions() -> dict[str, str]:
    """The installed versions of what the traps are in."""
    return {name: importlib.metadata.version(name) for name in ("keras", "keras-hub", "jax", "sentencepiece", "numpy")}


def print_table(found: dict[str, bool | str]) -> None:
    """Prints what `try_all` found, with the versions it was found on."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=", ".join(f"{name} {version}" for name, version in versions().items()))
    for heading in ("trap", "where", "what happens", "now"):
        table.add_column(heading, overflow="fold")
    for name, result in found.items():
        now = "still there" if result is True else "[bold]mended[/bold]"
        if isinstance(result, str):
            now = f"[bold]cannot be tried[/bold]: {result}"
        table.add_row(name, TRAPS[name].where, TRAPS[name].what, now)
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; with `--news`, prints nothing and fails unless a trap is mended or cannot be tried."""
    wants_news = "--news" in (sys.argv[1:] if arguments is None else arguments)
    found = try_all()
    if not wants_news:
        print_table(found)
        return 0
    return 0 if any(result is not True for result in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
