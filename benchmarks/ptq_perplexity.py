"""Perplexity of Gemma 3 270M when its weights, or its activations, are rounded to a small format after training.

Every run scores the same windows of the same English text (`evaluation.english_text()`, about a thousand tokens). Three
questions, one group of runs each:

    formats      every format, for the linear kernels alone and for kernels and embedding
    kinds        int4 per channel for one kind of layer at a time: which layers suffer?
    activations  int8 for the inputs of all linear layers, kernels untouched: which range, and one for how many?

Beside the perplexity stands the mean difference of the loss from float32's, in nats a token, with a standard error over
the tokens. They are paired: the same token in both runs.

    python benchmarks/ptq_perplexity.py                       # all: about 12 minutes on two cores, 4 GB
    python benchmarks/ptq_perplexity.py --groups kinds        # one group; runs that are in the JSON are not repeated
    python benchmarks/ptq_perplexity.py --output try.json --groups formats
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
GROUPS = ("formats", "kinds", "activations")
WINDOW, BLOCK, SEED = 256, 64, 2


class Scorer:
    """A Gemma whose weights may change between calls: the loss of every token of one text, in nats."""

    def __init__(self, model, text: str):
        import numpy as np

        tokenizer = model.preprocessor.tokenizer
        self.model, self.ids = model, np.asarray(tokenizer.tokenize(text), np.int32)
        self.start = tokenizer.token_to_id("<bos>")
        self.step = self.compiled()

    def compiled(self):
        """The losses of one window as a function of the weights; traced anew, so changed layers are seen."""
        import jax
        import keras

        backbone = self.model.backbone
        embedding = backbone.token_embedding.embeddings
        variables = backbone.variables

        @jax.jit
        def step(values, token_ids, targets):  # (window,), (window,) -> (window,)
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                mask = keras.ops.ones_like(token_ids)[None]
                hidden = backbone({"token_ids": token_ids[None], "padding_mask": mask})[0]  # (window, width)
                logits = keras.ops.matmul(hidden, keras.ops.transpose(embedding))  # (window, vocabulary)
            right = jax.numpy.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
            return jax.nn.logsumexp(logits, axis=1) - right

        return step

    def losses(self, step=None):
        """(tokens,) −ln p of each token, each window begun by <bos>; by `step`, or by the one compiled at first."""
        import numpy as np

        step = step or self.step
        values = [variable.value for variable in self.model.backbone.variables]
        found = []
        for first in range(0, len(self.ids), WINDOW):
            targets = self.ids[first : first + WINDOW]
            token_ids = np.concatenate([[self.start], targets[:-1]]).astype(np.int32)
            found.append(np.asarray(step(values, token_ids, targets), float))
        return np.concatenate(found)


def quantizers() -> dict:
    """`{name: quantizer}` of the formats."""
    from gemma_lora.lora import ptq

    spreads = {"per tensor": {}, "per channel": {"axis": 0}, f"per block of {BLOCK}": {"block_size": BLOCK}}
    found = {"bfloat16": ptq.floats("bfloat16"), "float16": ptq.floats("float16")}
    for bits in (8, 4, 3):
        for name, spread in spreads.items():
            found[f"int{bits} {name}"] = ptq.integers(bits, **spread)
    found[f"NF4 per block of {BLOCK}"] = ptq.nf4_blocks(BLOCK)
    found[f"NF4 per block of {BLOCK}, double"] = ptq.nf4_blocks(BLOCK, double_quant=True)
    return found


def format_runs(scorer):
    """`(name, run)` for every format, kernels alone and with the embedding."""
    from gemma_lora.lora import ptq

    sets = {"kernels": list(ptq.TARGETS), "kernels and embedding": list(ptq.KINDS)}
    for scope, kinds in sets.items():
        for name, quantizer in quantizers().items():
            yield f"{scope}: {name}", lambda q=quantizer, k=kinds: weights_run(scorer, q, k)


def kind_runs(scorer):
    """`(name, run)` for one kind of layer at a time."""
    from gemma_lora.lora import ptq

    for kind in ptq.KINDS:
        quantizer = ptq.integers(4, axis=0)
        yield f"{kind}: int4 per channel", lambda q=quantizer, k=kind: weights_run(scorer, q, [k])


def weights_run(scorer, quantizer, kinds):
    """Losses and size with the kernels of these kinds quantized."""
    from gemma_lora.lora import ptq

    with ptq.quantize_kernels(scorer.model, quantizer, kinds) as quantized:
        size = {"parameters": quantized.parameters, "bytes": quantized.nbytes}
        return scorer.losses(), size | {"bits_a_weight": round(quantized.bits_a_weight, 4)}


def activation_runs(scorer):
    """`(name, run)` for 8-bit inputs of all linear layers: a static range by four methods, and one for each token."""
    from sklearn.datasets import load_digits

    from gemma_lora.quantization.integers import calibrate, fake_quantize

    seen: dict = {}

    def watched():
        if not seen:  # calibration on another text than the one that is scored
            seen.update(activations(scorer.model, load_digits().DESCR, WINDOW))
        return seen

    def static(method):
        ranges = {path: calibrate(x, method, 8) for path, x in watched().items()}
        return lambda kernel, x: fake_quantize(x, 8, value_range=ranges[kernel.variable.path])

    def per_token(kernel, x):
        rows = x.reshape(x.shape[0] * x.shape[1], -1)  # (tokens, d_in)
        return fake_quantize(rows, 8, axis=0).reshape(x.shape)

    for method in ("minmax", "percentile", "mse", "entropy"):
        yield f"int8 static, {method}", lambda m=method: inputs_run(scorer, static(m))
    yield "int8 per token", lambda: inputs_run(scorer, per_token)


def activations(model, text: str, tokens: int) -> dict:
    """`{kernel's path: its inputs}` while the model reads the first tokens of a text."""
    import numpy as np

    from gemma_lora.lora import ptq

    tokenizer = model.preprocessor.tokenizer
    ids = [tokenizer.token_to_id("<bos>"), *tokenizer.tokenize(text)][:tokens]
    seen = {}

    def watch(kernel, x):
        seen[kernel.variable.path] = np.asarray(x)
        return x

    with ptq.mapped_inputs(model, watch):
        model.backbone({"token_ids": np.array([ids], np.int32), "padding_mask": np.ones((1, len(ids)), np.int32)})
    return seen


def inputs_run(scorer, function):
    """Losses with every linear layer's input changed by a function."""
    from gemma_lora.lora import ptq

    with ptq.mapped_inputs(scorer.model, function):
        return scorer.losses(scorer.compiled()), {}


def summary(losses, reference, size: dict, seconds: float) -> dict:
    """Perplexity, and the paired difference from float32 with its standard error."""
    difference = losses - reference
    error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    return {
        "perplexity": round(math.exp(float(losses.mean())), 4) if losses.mean() < 100 else None,
        "loss": round(float(losses.mean()), 5),
        "loss_difference": round(float(difference.mean()), 5),
        "standard_error": round(error, 5),
        **size,
        "seconds": round(seconds, 1),
    }


def main() -> int:
    """Runs what is not in the JSON yet and writes it after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/ptq_perplexity.json")
    chosen = parser.parse_args()

    import keras

    import gemma_lora as gl
    from gemma_lora.base.files import write_json_atomic
    from gemma_lora.base.hardware import machine
    from gemma_lora.gemma import load as gemma
    from gemma_lora.generation import evaluation
    from gemma_lora.job.finetuning import versions

    keras.utils.set_random_seed(SEED)
    scorer = Scorer(gl.load_gemma(), evaluation.english_text())
    record = json.loads(chosen.output.read_text()) if chosen.output.exists() else {"results": {}}
    start = time.perf_counter()
    reference = scorer.losses()
    float32 = {"parameters": scorer.model.count_params(), "bits_a_weight": 32.0}
    results = record["results"]
    results["reference"] = {"float32": summary(reference, reference, float32, time.perf_counter() - start)}
    record["settings"] = {"tokens": len(reference), "window": WINDOW, "block": BLOCK, "model": gemma.BUILTIN_NAME}
    record |= {"note": gemma.BUILTIN_NOTE, "machine": machine(), "versions": versions()}
    makers = {"formats": format_runs, "kinds": kind_runs, "activations": activation_runs}
    for group in chosen.groups:
        done = results.setdefault(group, {})
        for name, run in makers[group](scorer):
            if name in done:
                continue
            start = time.perf_counter()
            losses, size = run()
            done[name] = summary(losses, reference, size, time.perf_counter() - start)
            write_json_atomic(chosen.output, record)
            print(f"{group:12} {name:48} {done[name]}", flush=True)
    write_json_atomic(chosen.output, record)
    print(f"written to {chosen.output.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
