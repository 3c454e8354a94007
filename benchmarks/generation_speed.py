"""Greedy answers of a fine-tuned Gemma 3 270M: this project beside KerasHub's `generate` and Hugging Face's.

One process a peer, one after another, all with the weights and the adapter of `data/expenses/adapter` (merged, where a
peer has no such thing as ours) and the same validation lines in one batch. The first call compiles and is not timed.
Compared as well: how many answers are, to the letter, those of this project in float32.

    python benchmarks/generation_speed.py                           # all peers: 9 minutes, and bfloat16 on top
    python benchmarks/generation_speed.py --peers ours ours_mixed   # without torch
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
ROOT = Path(__file__).resolve().parent.parent
ADAPTER = ROOT / "data/expenses/adapter"
PEERS = ("ours", "ours_mixed", "keras_hub", "transformers_fp32", "transformers_bf16")
NEW_TOKENS = 64

Answers = Callable[[], list[list[int]]]  # new tokens of each line, without the stop token


def prompts(count: int, tokenizer) -> tuple[list, list[int]]:
    """The first validation lines in the template as token arrays, and the stop tokens."""
    import numpy as np

    import gemma_lora as gl
    from gemma_lora.data.dataset import encode_prompt

    dataset = gl.load_dataset(ROOT / "data/expenses")
    lines = [encode_prompt(e.prompt, tokenizer, dataset.template) for e in dataset.validation[:count]]
    stops = {tokenizer.token_to_id(token) for token in (*dataset.template.stop, "<eos>")}
    return [np.asarray(line, "int32") for line in lines], sorted(stops)


def ours(peer: str, count: int) -> Answers:
    import gemma_lora as gl
    from gemma_lora.generation.engine import generate_tokens

    model = gl.load_adapter(gl.load_gemma(), ADAPTER)
    tokens, stops = prompts(count, model.preprocessor.tokenizer)
    mixed = peer == "ours_mixed"
    return lambda: [
        row.tolist() for row in generate_tokens(model, tokens, stops, NEW_TOKENS, count, mixed_precision=mixed)
    ]


def keras_hub(peer: str, count: int) -> Answers:
    import numpy as np

    import gemma_lora as gl
    from gemma_lora import lora

    model = gl.load_adapter(gl.load_gemma(), ADAPTER)
    tokens, stops = prompts(count, model.preprocessor.tokenizer)
    lora.merge_lora(model)
    lora.detach_lora(model)
    model.preprocessor = None
    length = max(map(len, tokens)) + NEW_TOKENS
    token_ids = np.zeros((count, length), "int32")
    for row, line in enumerate(tokens):
        token_ids[row, : len(line)] = line
    # What `model.generate` calls; itself it stumbles over the images that are not there (keras-hub 0.32.0).
    function = model.make_generate_function()

    def answers() -> list[list[int]]:
        inputs = {"token_ids": token_ids, "padding_mask": token_ids != 0}
        made = np.asarray(function(inputs, stop_token_ids=stops)["token_ids"])
        return [until_stop(row[len(line) :].tolist(), stops) for row, line in zip(made, tokens, strict=True)]

    return answers


def hugging_face(peer: str, count: int) -> Answers:
    import torch
    import transformers
    from peft import PeftModel

    from gemma_lora.gemma import gguf
    from gemma_lora.gemma import load as gemma

    hub, path = gemma.import_keras_hub(), gemma.builtin_gguf()
    tokenizer = hub.tokenizers.Gemma3Tokenizer(proto=gguf.read_index(path).tokenizer, has_vision_tokens=False)
    tokens, stops = prompts(count, tokenizer)
    torch.set_num_threads(os.cpu_count() or 2)
    dtype = torch.bfloat16 if peer == "transformers_bf16" else torch.float32
    base = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    model = PeftModel.from_pretrained(base, str(ADAPTER)).merge_and_unload().eval()
    longest = max(map(len, tokens))
    token_ids = torch.zeros((count, longest), dtype=torch.long)
    attention = torch.zeros_like(token_ids)
    for row, line in enumerate(tokens):  # padding before the text, as batches want it there
        token_ids[row, longest - len(line) :] = torch.tensor(line)
        attention[row, longest - len(line) :] = 1

    def answers() -> list[list[int]]:
        named = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": stops, "pad_token_id": 0}
        with torch.inference_mode():
            made = model.generate(input_ids=token_ids, attention_mask=attention, **named)
        return [until_stop(row, stops) for row in made[:, longest:].tolist()]

    return answers


def until_stop(row: list[int], stops: list[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in stops), len(row))]


def run_one(peer: str, repeats: int, count: int) -> dict:
    """Measures one peer in this process."""
    from gemma_lora.base.hardware import keep_freed_memory, peak_memory_bytes

    prepare = ours if peer.startswith("ours") else keras_hub if peer == "keras_hub" else hugging_face
    if prepare is ours:
        keep_freed_memory()  # as the commands do, before JAX is there
    answers = prepare(peer, count)
    made, seconds = answers(), []
    for _ in range(repeats):
        start = time.perf_counter()
        made = answers()
        seconds.append(round(time.perf_counter() - start, 2))
    rate = sum(map(len, made)) / statistics.median(seconds)
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "new_tokens_per_second": round(rate, 1),
        "peak_bytes": peak_memory_bytes(),
        "answers": made,
    }


def main() -> int:
    """Runs the peers, prints a table, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=2, help="calls that are timed, after one that is not")
    parser.add_argument("--lines", type=int, default=64, help="validation lines, in one batch")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/generation_speed.json")
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import one_process

    if chosen.one:
        one_process.report(run_one(chosen.one, chosen.repeats, chosen.lines))
        return 0
    settings = {"lines": chosen.lines, "most_new_tokens": NEW_TOKENS, "alike": chosen.peers[0]}
    first: list = []  # the first peer's answers: ours in float32 unless another is asked for

    def line(peer: str, result: dict) -> str:
        answers = result.pop("answers")
        first.extend([] if first else answers)
        result["answers_alike"] = sum(a == b for a, b in zip(answers, first, strict=True))
        return (
            f"{peer:18} {result['median_seconds']:6.1f} s {result['new_tokens_per_second']:7.1f} new tokens/s "
            f"{result['peak_bytes'] / 1e9:6.2f} GB  {result['answers_alike']} of {chosen.lines} answers alike"
        )

    limits = ["--repeats", str(chosen.repeats), "--lines", str(chosen.lines)]
    return one_process.compare_peers(__file__, [[peer] for peer in chosen.peers], limits, settings, chosen.output, line)


if __name__ == "__main__":
    sys.exit(main())
