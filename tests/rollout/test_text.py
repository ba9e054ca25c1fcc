"""Detokenization token by token gives the text that decoding at once gives, and never half a character."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerokl.rollout.text import Detokenizer, Tokenizer

ODD_TEXTS = [
    "",
    "a",
    "  17",
    "a   1b",
    "naïve café",
    "中文 emoji 👩\u200d👩\u200d👧 end",
    "\n\n\tx",
    "\ufffd true",
    "e\u0301",
]


def test_encode_gives_int32_and_decodes_back(byte_tokenizer: Tokenizer) -> None:
    for text in ODD_TEXTS:
        ids = byte_tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert byte_tokenizer.decode(ids) == text


def test_special_tokens_are_left_out(byte_tokenizer: Tokenizer) -> None:
    special = byte_tokenizer.encode("<|end|>")
    assert len(special) == 1
    assert byte_tokenizer.decode(special) == ""
    detokenizer = Detokenizer(byte_tokenizer)
    assert detokenizer.push(byte_tokenizer.encode("a")) == "a"
    assert detokenizer.push(special) == ""
    assert detokenizer.push(byte_tokenizer.encode("b")) == "b"


def test_a_character_comes_out_whole(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    pieces = [detokenizer.push([int(token)]) for token in byte_tokenizer.encode("é中👩x")]
    assert pieces == ["", "é", "", "", "中", "", "", "", "👩", "x"]


def test_flush_shows_what_is_incomplete(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    ids = byte_tokenizer.encode("a中")
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.flush() == "a\ufffd"


def test_a_character_begun_in_the_prompt_belongs_to_the_output(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("a中b")
    detokenizer = Detokenizer(byte_tokenizer, ids[:2])
    assert "".join(detokenizer.push([int(token)]) for token in ids[2:]) == "中b"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40), st.integers(0, 10))
def test_token_by_token_equals_at_once(byte_tokenizer: Tokenizer, ids: list[int], prompt_len: int) -> None:
    prompt, output = ids[:prompt_len], ids[prompt_len:]
    one_by_one = Detokenizer(byte_tokenizer, prompt)
    text = "".join(one_by_one.push([token]) for token in output) + one_by_one.flush()
    at_once = Detokenizer(byte_tokenizer, prompt)
    assert text == at_once.push(output) + at_once.flush()


def test_leading_space_survives_a_decoder_that_strips_it(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3}
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"},
    }))  # fmt: skip
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode([1, 2]) == "a b"
    detokenizer = Detokenizer(tokenizer, [1])
    assert [detokenizer.push([token]) for token in (2, 3, 1, 2)] == [" b", "c", " a", " b"]


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file: .*tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer(tmp_path)
