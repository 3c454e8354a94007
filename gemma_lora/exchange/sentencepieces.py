"""Gemma's SentencePiece model as a list of pieces, and as the files that other programs' tokenizers read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_lora.base.files import GemmaLoraError, atomic_path, write_json_atomic, write_text_atomic
from gemma_lora.data.templates import CONTROL_TOKENS
from gemma_lora.gemma.sentencepiece_model import first_pieces, model_pieces

#: SentencePiece's numbers for kinds of pieces; GGUF uses the same.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: The four pieces that every Gemma has for itself, by transformers' names.
ENDS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
#: Names that mean something to a model and never stand for a user's text. Google's file calls most of them
#: user-defined pieces, llama.cpp's converter control tokens.
_RESERVED_NAMES = (
    *CONTROL_TOKENS,
    *("<pad>", "<mask>", "<2mass>", "[@BOS@]", "[multimodal]"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
_RESERVED = re.compile("|".join(map(re.escape, _RESERVED_NAMES)) + "|<unused[0-9]+>")


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A tokenizer's pieces; the n-th one is token n.

    Invariants: `texts`, `scores` and `kinds` are of one length; `ids` has the four of `ENDS` under transformers' names;
    `proto` is the serialized SentencePiece model with just these pieces.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    ids: Mapping[str, int]
    proto: bytes

    def is_reserved(self, number: int) -> bool:
        """Whether a token means something to the model and is no user's text."""
        reserved = _RESERVED.fullmatch(self.texts[number]) is not None
        return self.kinds[number] in (UNKNOWN, CONTROL) or (self.kinds[number] == USER_DEFINED and reserved)


def pieces_of(model: Any) -> Pieces:
    """The pieces of a model's tokenizer, no more than its embedding has rows.

    Args:
        model: A KerasHub Gemma `CausalLM` with a preprocessor.

    Raises:
        GemmaLoraError: If there is no SentencePiece tokenizer, or pieces of ordinary text have no row.
    """
    proto = getattr(getattr(getattr(model, "preprocessor", None), "tokenizer", None), "proto", None)
    if not isinstance(proto, bytes):
        raise GemmaLoraError(
            "The model has no SentencePiece tokenizer (model.preprocessor.tokenizer), which other programs need. "
            "Load it with load_gemma, or give it a KerasHub preprocessor."
        )
    pieces, rows = model_pieces(proto), model.backbone.vocabulary_size
    if len(pieces) > rows:
        if any(kind in (NORMAL, BYTE) for _, _, kind in pieces[rows:]):
            raise GemmaLoraError(
                f"The tokenizer has {len(pieces):,} pieces, the embedding {rows:,} rows: some text has no weights."
            )
        pieces, proto = pieces[:rows], first_pieces(proto, rows)
    texts, scores, kinds = (list(column) for column in zip(*pieces, strict=True))
    numbers = {text: number for number, text in enumerate(texts)}
    if missing := [text for text in ENDS.values() if text not in numbers]:
        raise GemmaLoraError(f"The tokenizer has no piece {missing[0]}: it is not a Gemma's.")
    return Pieces(texts, scores, kinds, {name: numbers[text] for name, text in ENDS.items()}, proto)


# --- the files of transformers -----------------------------------------------------------------------------


def write_tokenizer(pieces: Pieces, folder: Path, chat_template: str) -> None:
    """Writes what transformers, and what reads its folders, needs of a tokenizer.

    Args:
        pieces: The tokenizer.
        folder: Where `tokenizer.json`, `tokenizer.model`, `tokenizer_config.json` and `chat_template.jinja` go.
        chat_template: A Jinja template.
    """
    with atomic_path(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(pieces.proto)
    write_text_atomic(folder / "tokenizer.json", json.dumps(tokenizer_json(pieces), ensure_ascii=False))
    write_text_atomic(folder / "chat_template.jinja", chat_template)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **ENDS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 1_000_000_000,
        "chat_template": chat_template,
    }
    write_json_atomic(folder / "tokenizer_config.json", config)


def tokenizer_json(pieces: Pieces) -> dict[str, Any]:
    """The tokenizer in the format of Hugging Face's `tokenizers`.

    SentencePiece looks for user-defined pieces after it has written ▁ for spaces, and for control pieces never. Here
    control pieces are found too, in the text as it is given: a chat template writes them.
    """
    bos = {"id": ENDS["bos_token"], "type_id": 0}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            *({"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}),
            *({"SpecialToken": bos | {"type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}),
        ],
        "special_tokens": {
            bos["id"]: {"id": bos["id"], "ids": [pieces.ids["bos_token"]], "tokens": [bos["id"]]},
        },
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(pieces),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": template,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": ENDS["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: number for number, text in enumerate(pieces.texts)},
            "merges": merges(pieces),
        },
    }


def _added_tokens(pieces: Pieces) -> list[dict[str, Any]]:
    fixed = {"single_word": False, "lstrip": False, "rstrip": False}
    found = []
    for number, (text, kind) in enumerate(zip(pieces.texts, pieces.kinds, strict=True)):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            special = kind != USER_DEFINED or text in CONTROL_TOKENS
            ordinary = kind == USER_DEFINED and not pieces.is_reserved(number)
            found.append({"id": number, "content": text, **fixed, "normalized": ordinary, "special": special})
    return found


def merges(pieces: Pieces) -> list[list[str]]:
    """The pairs that byte-pair encoding joins, the first ones first.

    SentencePiece keeps no such list: it joins the two neighbours whose joint piece has the highest score. So every
    way to cut a piece in two pieces is a pair, in the order of the joint pieces' scores.
    """
    normal = {text: number for number, text in enumerate(pieces.texts) if pieces.kinds[number] == NORMAL}
    found = []
    for text, number in normal.items():
        cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
        cuts = [(left, right) for left, right in cuts if left in normal and right in normal]
        cuts.sort(key=lambda cut: (normal[cut[0]], normal[cut[1]]))
        found += [(-pieces.scores[number], *cut) for cut in cuts]
    found.sort(key=lambda pair: pair[0])
    return [[left, right] for _, left, right in found]
