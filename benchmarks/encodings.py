"""What rounding alone costs: Gemma 3 270M in every encoding that its frozen weights can have, before training on it.

Each encoding is loaded in a process of its own and scored twice: on English text (`evaluation.english_text()`) as it
is, and on 60 validation lines of data/expenses with the adapter that is kept there. That adapter was trained on float32
weights, so the second column is an adapter on another base than its own. Beside them stands what the weights take.

The mean difference of the English loss from float32's comes with a standard error. The losses are paired, blocks of 64
tokens in both runs: neighbours in a text are not independent, blocks nearly are.

    python benchmarks/encodings.py               # what is missing: some minutes on two cores, 3 GB
    python benchmarks/encodings.py --only nf4    # one encoding
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
WINDOW, BLOCK, LINES, ROW_LENGTH = 256, 64, 60, 384
#: Arguments of `load_gemma`. The first is what the others are compared with.
ENCODINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "nf4": {"quantization": "nf4"},
    "nf4_double": {"quantization": "nf4", "double_quant": True},
    "gguf": {"quantization": "gguf"},
}


def sizes(model) -> dict[str, float]:
    """Bytes and bits a weight of the linear layers and of the embedding, whether packed or not."""
    from gemma_lora import lora
    from gemma_lora.layers.linear import matrix_shape
    from gemma_lora.lora import qlora

    count = sum(math.prod(matrix_shape(layer)) for _, _, layer in lora.linear_layers(model))
    table = model.backbone.token_embedding
    found = qlora.weight_bytes(model)
    linear, rest = found["linear_bytes"], found["other_bytes"]
    if not qlora.packed_layers(model):
        linear = sum(layer._kernel.value.nbytes for _, _, layer in lora.linear_layers(model))
        rest -= linear
    return {
        "linear_weights": count,
        "linear_bytes": linear,
        "linear_bits": round(8 * linear / count, 4),
        "embedding_bytes": found["embedding_bytes"],
        "embedding_bits": round(8 * found["embedding_bytes"] / (table.input_dim * table.output_dim), 4),
        "other_bytes": rest,
        "total_bytes": linear + found["embedding_bytes"] + rest,
    }


def block_losses(model, text: str, window: int = WINDOW, block: int = BLOCK) -> tuple[list[float], list[int]]:
    """The mean loss of every `block` tokens of a text, in nats, in windows that each begin with `<bos>`.

    Returns:
        The means, and how many tokens are in each: the last block of a window may be shorter.
    """
    import jax
    import keras
    import numpy as np

    from gemma_lora.layers.loss import token_scores
    from gemma_lora.lora.qlora import head_table

    tokenizer = model.preprocessor.tokenizer
    ids = np.asarray(tokenizer.tokenize(text), np.int32)
    start = tokenizer.token_to_id("<bos>")
    variables = model.backbone.variables

    @jax.jit
    def losses_of(values, token_ids, targets):  # (window,), (window,) -> (window,)
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            hidden = model.backbone(
                {"token_ids": token_ids[None], "padding_mask": keras.ops.ones_like(token_ids)[None]}
            )
            embedding = model.backbone.token_embedding
            return token_scores(hidden[0], head_table(embedding), targets, soft_cap=embedding.logit_soft_cap)[0]

    values = [variable.value for variable in variables]
    means, counts = [], []
    for first in range(0, len(ids), window):
        targets = ids[first : first + window]
        padded = np.pad(targets, (0, window - len(targets)))  # one shape; what is read later changes nothing before it
        losses = np.asarray(losses_of(values, np.r_[start, padded[:-1]].astype(np.int32), padded), float)[
            : len(targets)
        ]
        parts = np.split(losses, range(block, len(losses), block))
        means += [round(float(part.mean()), 5) for part in parts]
        counts += [len(part) for part in parts]
    return means, counts


def measure(name: str) -> dict[str, Any]:
    """One encoding, in this process."""
    import gemma_lora as gl
    from gemma_lora.base import hardware
    from gemma_lora.generation import evaluation

    hardware.use_compilation_cache()
    model = gl.load_gemma(**ENCODINGS[name])
    result: dict[str, Any] = sizes(model)
    text = evaluation.english_text()
    result["perplexity"] = round(evaluation.perplexity(model, text, WINDOW), 4)
    result["block_losses"], result["block_tokens"] = block_losses(model, text)
    gl.load_adapter(model, ROOT / "data/expenses/adapter")
    dataset = gl.load_dataset(ROOT / "data/expenses")
    scores = evaluation.teacher_forced(model, dataset.validation[:LINES], dataset.template, ROW_LENGTH)
    result["adapter_loss"] = round(scores.loss, 5)
    result["adapter_exact_match"] = round(scores.exact_match, 4)
    result["peak_memory_bytes"] = hardware.peak_memory_bytes()
    return result


def difference(losses: list[float], reference: list[float], tokens: list[int]) -> tuple[float, float]:
    """The mean difference of paired block losses, a token, and its standard error over the blocks."""
    share = [count / statistics.mean(tokens) for count in tokens]
    apart = [weight * (one - other) for weight, one, other in zip(share, losses, reference, strict=True)]
    return statistics.mean(apart), statistics.stdev(apart) / math.sqrt(len(apart))


def main() -> int:
    """Measures what is not in the JSON yet and writes it after each encoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ENCODINGS, default=list(ENCODINGS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/encodings.json")
    parser.add_argument("--one", choices=ENCODINGS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import one_process

    if chosen.one:
        one_process.report(measure(chosen.one))
        return 0
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.gemma import load as gemma
    from gemma_lora.job.finetuning import versions

    results = json.loads(chosen.output.read_text())["results"] if chosen.output.exists() else {}
    for name in chosen.only:
        if name in results:
            continue
        result = one_process.measure(__file__, "--one", name)
        if result is None:
            return 1
        results[name] = result
        if reference := results.get("float32"):
            for run in results.values():
                apart = difference(run["block_losses"], reference["block_losses"], run["block_tokens"])
                run["loss_difference"], run["standard_error"] = (round(number, 5) for number in apart)
        settings = {"window": WINDOW, "block": BLOCK, "lines": LINES, "row_length": ROW_LENGTH}
        record = {
            "results": {known: results[known] for known in ENCODINGS if known in results},
            "settings": settings | {"model": gemma.BUILTIN_NAME, "encodings": ENCODINGS},
            "note": gemma.BUILTIN_NOTE,
            "machine": machine(),
            "versions": versions(),
        }
        write_json_atomic(chosen.output, record)
        shown = ("linear_bits", "embedding_bits", "total_bytes", "perplexity", "adapter_loss", "adapter_exact_match")
        print(name, {key: result[key] for key in shown}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
