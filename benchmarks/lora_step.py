"""LoRA training of Gemma 3 270M: this project beside KerasHub's own path and Hugging Face PEFT.

One process a peer, all with the same weights, the same lines and the same adapter (rank 8 on query and value).
Measured: seconds a step and the process's peak memory on 4 rows of 256 tokens that all carry loss, and loss-carrying
tokens a second over the training lines, each peer with its own way of batching. Peers of a group are in memory at the
same time and work in turns, a step or an eighth of the lines each, since the machine drifts.

The lines are trained on, so that the gradient filter meets what it meets in a training: a model that is unsure of
everything first, and of little later on.

    python benchmarks/lora_step.py                          # all peers: 40 minutes on two cores, 20 GB of memory
    python benchmarks/lora_step.py --lines 48 --repeats 3   # quickly
    python benchmarks/lora_step.py --peers ours keras_hub   # two of them, in turns; without torch
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import one_process

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
#: Peers that are compared with each other and fit in memory together.
GROUPS = (
    ("ours_mixed", "keras_hub", "peft_bf16"),
    ("ours", "keras_hub_mixed", "peft_fp32"),
    ("ours_filtered", "ours_remat"),
)
PEERS = tuple(peer for group in GROUPS for peer in group)
SLICES = 8  # turns in which the lines are gone through
ROWS, LENGTH, RANK, RATE = 4, 256, 8, 5e-4


def lines(count: int, tokenizer=None):
    """The first training lines as `(tokens, loss mask)`, and the tokenizer's ids of them all in one stream."""
    import numpy as np

    import gemma_lora as gl
    from gemma_lora.data import dataset as data
    from gemma_lora.gemma import gguf
    from gemma_lora.gemma import load as gemma

    dataset = gl.load_dataset(ROOT / "data/expenses")
    if tokenizer is None:
        hub = gemma.import_keras_hub()
        proto = gguf.read_index(gemma.builtin_gguf()).tokenizer
        tokenizer = hub.tokenizers.Gemma3Tokenizer(proto=proto, has_vision_tokens=False)
    encoded = data.encode(dataset.train[:count], tokenizer, dataset.template, LENGTH)
    stream = np.concatenate(encoded.tokens)[: ROWS * LENGTH + 1]
    return encoded, stream


def timed(step, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls after one that warms up, each in a turn of its own."""
    step()
    seconds = []
    for _ in range(repeats):
        one_process.pass_turn()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def rate(step, batches: list, carrying: list[float]) -> float:
    """Loss-carrying tokens a second of `step(*batch)` over all batches, after one that warms up, in `SLICES` turns."""
    step(*batches[0])
    seconds = 0.0
    for number in range(SLICES):
        one_process.pass_turn()
        start = time.perf_counter()
        for batch in batches[number::SLICES]:
            step(*batch)
        seconds += time.perf_counter() - start
    return sum(carrying) / seconds


def full_batch(stream):
    """4 x 256 tokens without padding; every position carries loss."""
    import numpy as np

    token_ids = stream[:-1].reshape(ROWS, LENGTH).astype("int32")
    targets = stream[1:].reshape(ROWS, LENGTH).astype("int32")
    return token_ids, targets, np.ones((ROWS, LENGTH), "float32")


def run_ours(peer: str, repeats: int, count: int) -> dict:
    from gemma_lora.base.hardware import keep_freed_memory, peak_memory_bytes

    keep_freed_memory()  # as `gemma-lora finetune` does, before JAX is there
    import numpy as np

    import gemma_lora as gl
    from gemma_lora.data import packing
    from gemma_lora.layers.loss import fitting_chunk

    model = gl.load_gemma()
    encoded, stream = lines(count, model.preprocessor.tokenizer)
    gl.apply_lora(model, rank=RANK, targets=("query", "value"))
    named = {"mixed_precision": peer == "ours_mixed", "remat": peer == "ours_remat", "chunk_size": 256}
    named["filter_gradient"] = peer in ("ours_mixed", "ours_filtered")
    tuner = gl.FineTuner(model, rows=ROWS, row_length=LENGTH, **named)
    start_values = [np.asarray(variable.value) for variable in model.trainable_variables]
    tuner.compile_for(100)
    token_ids, targets, weights = full_batch(stream)
    x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    seconds = timed(lambda: tuner.train_on_batch(x, targets, weights), repeats)
    peak = peak_memory_bytes()
    best = {}
    for rows in (1, 2):  # `gemma-lora finetune`'s shape, and twice that
        batches = packing.pack(encoded.tokens, encoded.loss_mask, rows, 384, 0)
        carrying = [int((batch.weights > 0).sum()) for batch in batches]
        tuner.settings["chunk_size"] = fitting_chunk(int(np.quantile(carrying, 0.95)))
        arrays = [batch.as_keras() for batch in batches]
        for variable, value in zip(model.trainable_variables, start_values, strict=True):
            variable.assign(value)  # each shape meets lines that were not trained on yet
        tuner.compile_for(len(batches) + 1)
        best[f"packed, {rows} x 384"] = rate(tuner.train_on_batch, arrays, carrying)
    return outcome(seconds, peak, best)


def outcome(seconds: list[float], peak: int, best: dict[str, float]) -> dict:
    """What is kept of a peer; `best` has loss-carrying tokens a second for each way of batching."""
    batching = max(best, key=best.get)
    return {
        "step_seconds": seconds,
        "peak_bytes": peak,
        "loss_tokens_per_second": best[batching],
        "batching": batching,
    }


def run_keras_hub(peer: str, repeats: int, count: int) -> dict:
    import keras
    import numpy as np

    import gemma_lora as gl
    from gemma_lora.base.hardware import peak_memory_bytes

    model = gl.load_gemma()
    encoded, stream = lines(count, model.preprocessor.tokenizer)
    if peer == "keras_hub_mixed":
        for layer in model._flatten_layers():
            layer.dtype_policy = "mixed_bfloat16"
    model.preprocessor = None
    model.backbone.enable_lora(RANK)
    model.compile(
        optimizer=keras.optimizers.Adam(RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    token_ids, targets, weights = full_batch(stream)
    x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    seconds = timed(lambda: model.train_on_batch(x, targets, weights), repeats)
    peak = peak_memory_bytes()
    # One shape, so that XLA compiles once: the longest line.
    length = -(-max(map(len, encoded.tokens)) // 16) * 16
    best = {}
    for rows in (4, 8):
        groups = [range(start, min(start + rows, count)) for start in range(0, count - count % rows, rows)]
        arrays = [padded(encoded, group, length) for group in groups]
        batches = [({"token_ids": t, "padding_mask": (t != 0).astype("int32")}, y, w) for t, y, w in arrays]
        carrying = [float(w.sum()) for _, _, w in arrays]
        best[f"padded, {rows} x {length}"] = rate(model.train_on_batch, batches, carrying)
    return outcome(seconds, peak, best)


def padded(encoded, members, length: int):
    """`(token ids, targets, weights)` of lines, one a row, filled with 0."""
    import numpy as np

    token_ids, targets = np.zeros((2, len(members), length), "int32")
    weights = np.zeros((len(members), length), "float32")
    for row, index in enumerate(members):
        ids, mask = encoded.tokens[index], encoded.loss_mask[index]
        token_ids[row, : len(ids)] = ids
        targets[row, : len(ids) - 1] = ids[1:]
        weights[row, : len(ids) - 1] = mask[1:]
    return token_ids, targets, weights


def run_peft(peer: str, repeats: int, count: int) -> dict:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from gemma_lora.base.hardware import peak_memory_bytes
    from gemma_lora.gemma import load as gemma

    encoded, stream = lines(count)
    torch.set_num_threads(os.cpu_count() or 2)
    path = gemma.builtin_gguf()
    dtype = torch.bfloat16 if peer == "peft_bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    model.train()

    def step(token_ids, labels, attention):
        optimizer.zero_grad()
        model(input_ids=token_ids, attention_mask=attention, labels=labels, use_cache=False).loss.backward()
        optimizer.step()

    token_ids = torch.tensor(full_batch(stream)[0]).long()
    seconds = timed(lambda: step(token_ids, token_ids, torch.ones_like(token_ids)), repeats)
    peak = peak_memory_bytes()
    best = {}
    order = sorted(range(count), key=lambda i: len(encoded.tokens[i]))  # batches of lines of like length
    for rows in (8, 16):
        batches, carrying = [], []
        for start in range(0, count - count % rows, rows):
            members = order[start : start + rows]
            t, y, w = padded(encoded, members, max(len(encoded.tokens[i]) for i in members))
            labels = torch.full(t.shape, -100)
            labels[:, 1:] = torch.tensor(y[:, :-1]).long().masked_fill(torch.tensor(w[:, :-1] == 0), -100)
            batches.append((torch.tensor(t).long(), labels, torch.tensor((t != 0).astype("int64"))))
            carrying.append(float(w.sum()))
        best[f"by length, {rows} rows"] = rate(step, batches, carrying)
    return outcome(seconds, peak, best)


def run_one(peer: str, repeats: int, count: int) -> dict:
    """Measures one peer in this process."""
    run = run_ours if peer.startswith("ours") else run_keras_hub if peer.startswith("keras_hub") else run_peft
    result = run(peer, repeats, count)
    result["step_seconds"] = [round(s, 3) for s in result["step_seconds"]]
    result["median_step_seconds"] = round(statistics.median(result["step_seconds"]), 3)
    result["loss_tokens_per_second"] = round(result["loss_tokens_per_second"], 1)
    return result


def main() -> int:
    """Runs the peers, prints a table, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="one group of these; all groups by default")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed, after one that is not")
    parser.add_argument("--lines", type=int, default=144, help="training lines for tokens a second")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/lora_step.json")
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one_process.report(run_one(chosen.one, chosen.repeats, chosen.lines))
        return 0
    settings = {"rows": ROWS, "length": LENGTH, "rank": RANK, "targets": ["query", "value"], "lines": chosen.lines}

    def line(peer: str, result: dict) -> str:
        return (
            f"{peer:15} {result['median_step_seconds']:7.2f} s/step {result['peak_bytes'] / 1e9:6.2f} GB "
            f"{result['loss_tokens_per_second']:7.1f} loss tokens/s  ({result['batching']})"
        )

    limits = ["--repeats", str(chosen.repeats), "--lines", str(chosen.lines)]
    groups = [chosen.peers] if chosen.peers else GROUPS
    return one_process.compare_peers(__file__, groups, limits, settings, chosen.output, line)


if __name__ == "__main__":
    sys.exit(main())
