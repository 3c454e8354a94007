"""The SentencePiece file that we write and read, against protobuf's own writer and SentencePiece's reader."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from gemma_lora.gemma.sentencepiece_model import first_pieces, model_bytes, model_pieces, varint

PIECES = [("<pad>", 0.0, 3), ("<eos>", 0.0, 3), ("<bos>", 0.0, 3), ("<unk>", 0.0, 2), ("▁▁", -1.5, 4)]
PIECES += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] + [("a", -1e3, 1), ("é", -2.25, 1), ("aé", -0.1, 1)]
IDS = {"unk_id": 3, "bos_id": 2, "eos_id": 1, "pad_id": 0}


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 262_144, 2**32 - 1])
def test_a_varint_is_its_number_in_sevens_of_bits(number):
    groups = varint(number)
    assert sum((byte & 0x7F) << 7 * place for place, byte in enumerate(groups)) == number
    assert [byte >> 7 for byte in groups] == [1] * (len(groups) - 1) + [0]


def test_sentencepiece_reads_every_piece_and_cuts_text_without_adding_a_space():
    read = sentencepiece.SentencePieceProcessor(model_proto=model_bytes(PIECES, IDS))
    assert [read.id_to_piece(i) for i in range(read.get_piece_size())] == [piece for piece, _, _ in PIECES]
    assert [read.get_score(i) for i in (4, 261)] == [-1.5, -1e3]
    assert (read.unk_id(), read.pad_id()) == (3, 0)
    assert [read.id_to_piece(i) for i in read.encode("aéa  z")] == ["aé", "a", "▁▁", "<0x7A>"]


def test_the_bytes_are_those_of_protobufs_own_writer():
    try:
        from sentencepiece import sentencepiece_model_pb2 as generated
    except Exception as error:  # protobuf's VersionError: the generated code is newer than the protobuf here
        pytest.skip(str(error))
    model = generated.ModelProto()
    for piece, score, kind in PIECES:
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = {"model_type": 2, "vocab_size": len(PIECES), "byte_fallback": True, **IDS}
    for name, value in trainer.items():
        setattr(model.trainer_spec, name, value)
    for name in ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        setattr(model.normalizer_spec, name, name == "escape_whitespaces")
    model.normalizer_spec.name = "identity"
    assert model_bytes(PIECES, IDS) == model.SerializeToString()
    model.normalizer_spec.precompiled_charsmap = bytes(range(256))  # what we do not know of is passed over, and kept
    model.trainer_spec.input.append("a file")
    theirs = model.SerializeToString()
    assert model_pieces(theirs) == as_float32(PIECES)
    del model.pieces[4:]
    model.trainer_spec.vocab_size = 4
    assert generated.ModelProto.FromString(first_pieces(theirs, 4)) == model


def as_float32(pieces):
    return [(piece, float(np.float32(score)), kind) for piece, score, kind in pieces]


def test_what_was_written_is_read_and_a_shorter_model_is_one():
    written = model_bytes(PIECES, IDS)
    assert model_pieces(written) == as_float32(PIECES)
    shorter = first_pieces(written, 261)
    assert model_pieces(shorter) == as_float32(PIECES[:261])
    assert sentencepiece.SentencePieceProcessor(model_proto=shorter).get_piece_size() == 261


def test_a_part_of_a_file_is_refused():
    written = model_bytes(PIECES[:5], IDS)
    for end in range(1, len(written)):
        try:
            assert len(model_pieces(written[:end])) <= 5
        except ValueError as error:
            assert "no SentencePiece model" in str(error)
    with pytest.raises(ValueError, match="end within the field"):
        model_pieces(written[: len(written) - 1])


def test_the_package_imports_no_generated_code():
    """It refuses to run with the protobuf that Colab has."""
    package = Path(__file__).parents[2] / "gemma_lora"
    assert not [path.name for path in package.rglob("*.py") if "model_pb2" in path.read_text(encoding="utf-8")]
