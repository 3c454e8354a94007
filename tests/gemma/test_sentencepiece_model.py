"""The SentencePiece file that we write, against protobuf's own writer and SentencePiece's reader."""

import pytest
import sentencepiece

from gemma_lora.gemma.sentencepiece_model import model_bytes, varint

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
