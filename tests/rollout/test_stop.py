"""Stop strings end the text before them, wherever token boundaries fall."""

from __future__ import annotations

import numpy as np

from zerokl.rollout.stop import StopWatch, find_stop
from zerokl.rollout.text import Tokenizer

NO_PROMPT = np.zeros(0, np.int32)


def run(tokenizer: Tokenizer, text: str, stop: tuple[str, ...], min_tokens: int = 0) -> tuple[str | None, str, int]:
    """(stop string or None, text kept, tokens taken) of pushing `text` token by token."""
    watch = StopWatch(tokenizer, NO_PROMPT, stop, min_tokens)
    ids = tokenizer.encode(text)
    for count, token in enumerate(ids, start=1):
        found = watch.push(int(token))
        if found is not None:
            return found, watch.text, count
    return None, watch.finish(), len(ids)


def test_find_stop_prefers_the_earliest_start_then_the_first_given() -> None:
    assert find_stop("abcd", 0, ("cd", "bc")) == (1, "bc")
    assert find_stop("abcd", 0, ("abc", "ab")) == (0, "abc")
    assert find_stop("abcd", 0, ("x",)) is None


def test_find_stop_looks_only_at_what_new_text_completes() -> None:
    assert find_stop("a.b", 2, (".",)) is None
    assert find_stop("a..b", 2, ("..",)) == (1, "..")


def test_text_ends_before_the_stop_string(byte_tokenizer: Tokenizer) -> None:
    assert run(byte_tokenizer, "one\n\ntwo", ("\n\n",)) == ("\n\n", "one", 5)
    assert run(byte_tokenizer, "no stop", ("\n\n",)) == (None, "no stop", 7)


def test_a_stop_string_across_tokens_and_inside_a_character(byte_tokenizer: Tokenizer) -> None:
    assert run(byte_tokenizer, "x中文y", ("中文",)) == ("中文", "x", 7)


def test_a_stop_string_completed_before_min_tokens_is_passed_over(byte_tokenizer: Tokenizer) -> None:
    assert run(byte_tokenizer, "a.b.c", (".",), min_tokens=3) == (".", "a.b", 4)
    assert run(byte_tokenizer, "a.b.c", (".",), min_tokens=2) == (".", "a", 2)
