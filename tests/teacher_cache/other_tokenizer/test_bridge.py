"""How a bridge matches two vocabularies, and what it makes of records."""

from __future__ import annotations

import math

import torch

from teacher_cache.other_tokenizer.bridge import TokenizerBridge
from teacher_cache.other_tokenizer.token_bytes import TokenBytes
from tests.teacher_cache.other_tokenizer.dense import sequence_of
from tests.teacher_cache.other_tokenizer.test_dense import records_of
from tests.teacher_cache.other_tokenizer.tokenizers import bridge, end_id, tokenizer


def test_tokens_are_matched_one_to_one_by_bytes_and_ends_of_turns_by_role() -> None:
    pair = bridge("llama", "byte400")
    number, own = tokenizer("llama").convert_tokens_to_ids, tokenizer("byte400").convert_tokens_to_ids
    assert pair.to_student_W[number("▁")] == own("Ġ")
    assert pair.to_student_W[number("<0x0A>")] == own("Ċ")
    assert pair.to_student_W[number("</s>")] == own("<|im_end|>")
    assert pair.to_student_W[number("<image>")] == own("<image>")
    assert pair.to_student_W[number("<0x61>")] == -1  # the token "a" stands for this byte
    matched = pair.to_student_W[pair.to_student_W >= 0]
    assert len(set(matched.tolist())) == len(matched) == int(pair.has_counterpart_V.sum())


def test_an_end_of_turn_takes_its_counterpart_from_the_token_of_the_same_name() -> None:
    pair = bridge("byte400", "byte300")  # end turns with <|im_end|> and <|endoftext|>, which both have
    number = tokenizer("byte400").convert_tokens_to_ids
    assert pair.to_student_W[end_id("byte400")] == end_id("byte300")
    assert pair.to_student_W[number("<|endoftext|>")] == -1
    assert not pair.has_counterpart_V[tokenizer("byte300").convert_tokens_to_ids("<|im_end|>")]


PIECES = (b"hel", b"lo", b"p", b"x", b"<end>")
WHOLE = (b"hello", b"help", b"hel", b"lo", b"</s>", b"lox")


def _tokens(pieces: tuple[bytes, ...]) -> TokenBytes:
    return TokenBytes(pieces, {piece: number for number, piece in enumerate(pieces)})


def test_a_span_of_the_teachers_tokens_is_matched_as_a_whole() -> None:
    pair = TokenizerBridge.of(_tokens(PIECES), _tokens(WHOLE), (4, 4))
    probs_NW = torch.tensor([[0.8, 0.1, 0.04, 0.03, 0.03], [0.05, 0.6, 0.25, 0.06, 0.04], [0.1, 0.1, 0.1, 0.1, 0.6]])
    records = records_of(probs_NW.double().log(), torch.tensor([0, 1, 4]), top_k=3)
    found = pair.targets(records, [3], [sequence_of([0, 4])])
    assert found.rows_S.tolist() == [0, 1]
    assert found.is_single_S.tolist() == [False, True]
    assert found.path_log_probs_S.exp().tolist() == [0.800000011920929, 1.0]
    # hel + lo, hel + p and hel + x; the student has no single token for the last
    assert found.topk_ids_SK[0].tolist() == [0, 1, -1, -1]
    torch.testing.assert_close(found.topk_log_probs_SK[0].exp(), torch.tensor([0.48, 0.2, 0.0, 0.0]))
    torch.testing.assert_close(found.unmatched_log_probs_SU[0].exp(), torch.tensor([0.048]))
    torch.testing.assert_close(found.tail_log_mass_S[0].exp(), torch.tensor(0.072))


def test_a_span_of_the_students_tokens_is_matched_after_its_earlier_ones() -> None:
    pair = TokenizerBridge.of(_tokens(WHOLE), _tokens(PIECES), (4, 4))
    probs_NW = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.06, 0.04], [0.1, 0.1, 0.1, 0.1, 0.5, 0.1]])
    records = records_of(probs_NW.double().log(), torch.tensor([0, 4]), top_k=6)
    found = pair.targets(records, [2], [sequence_of([0, 1, 4])])
    assert found.rows_S.tolist() == [1, 2]
    assert (found.rows_P.tolist(), found.spans_P.tolist()) == ([0], [0])
    # hello and help; not hel, which adds nothing to the student's earlier token
    assert found.topk_ids_SK[0].tolist()[:2] == [1, 2]
    assert found.topk_ids_SK[0].tolist()[2:] == [-1] * 5
    torch.testing.assert_close(found.unmatched_log_probs_SU[0].exp(), torch.tensor([0.1, 0.1, 0.06, 0.04]))


def test_an_actual_token_outside_the_top_k_is_taken_from_the_tail() -> None:
    pair = TokenizerBridge.of(_tokens(PIECES), _tokens(PIECES), (4, 4))
    probs_NW = torch.tensor([[0.5, 0.2, 0.1, 0.15, 0.05], [0.1, 0.1, 0.1, 0.1, 0.6]])
    records = records_of(probs_NW.double().log(), torch.tensor([2, 4]), top_k=2)
    found = pair.targets(records, [2], [sequence_of([2, 4])])
    assert found.topk_ids_SK.tolist() == [[0, 1, 2], [4, 0, -1]]
    torch.testing.assert_close(found.topk_log_probs_SK[0].exp(), torch.tensor([0.5, 0.2, 0.1]))
    torch.testing.assert_close(found.tail_log_mass_S.exp(), torch.tensor([0.2, 0.3]))
    assert math.isclose(found.unmatched_log_probs_SU.exp().sum(), 0.0)
