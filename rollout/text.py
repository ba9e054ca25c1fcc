"""Text in and out: a Hugging Face `tokenizer.json`, and detokenization token by token.

Special tokens (as tokenizer.json marks them) are added by `encode` the way the file's post-processor says and left out
by decoding, so a stop string never matches one: stop on those by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as _FastTokenizer

_INCOMPLETE = "\ufffd"
_CONTEXT_TOKENS = 8
"""Tokens before the first new one that are decoded along: some decoders treat the first token of a text differently."""


class Tokenizer:
    """Text <-> token ids by one `tokenizer.json`. Safe to use from several threads."""

    def __init__(self, path: str | Path) -> None:
        """`path`: a tokenizer.json, or a folder that holds one. Raises ValueError when it is absent or unreadable."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"tokenizer: no such file: {file}")
        try:
            self._tokenizer = _FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception for every kind of broken file
            raise ValueError(f"tokenizer: cannot read {file}: {error}") from error
        # A file may carry settings of its training run; a prompt is never cut or padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids, int32 [P], with the special tokens that the file's post-processor adds."""
        return np.asarray(self._tokenizer.encode(text).ids, np.int32)

    def decode(self, token_ids: Sequence[int] | NDArray[np.int32]) -> str:
        """Text of the ids; incomplete UTF-8 becomes U+FFFD and special tokens are left out."""
        ids = token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(token_ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class Detokenizer:
    """Text of one output, grown token by token; a character is given out once all its bytes are there.

    Keeps a window of recent tokens that begins at a character boundary: `window[:read]` is given out already, the rest
    not yet. The new text is what the whole window adds to the text of the part given out, so decoders whose first
    token is special (a leading space dropped, say) do no harm.
    """

    __slots__ = ("_read", "_shown", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] | NDArray[np.int32] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = [int(token) for token in prompt_token_ids[-_CONTEXT_TOKENS:]]
        self._read = len(self._window)
        # A character that begins in the prompt and ends in the output belongs to the output.
        self._shown = tokenizer.decode(self._window).rstrip(_INCOMPLETE)

    def push(self, token_ids: Sequence[int] | NDArray[np.int32]) -> str:
        """Take new tokens; return the text that they complete (maybe "")."""
        self._window.extend(int(token) for token in token_ids)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_INCOMPLETE):
            return ""
        return self._give_out(text)

    def flush(self) -> str:
        """Text of what is still held back; incomplete characters as U+FFFD."""
        return self._give_out(self._tokenizer.decode(self._window))

    def _give_out(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            self._window = self._window[self._read :]
            self._shown = self._tokenizer.decode(self._window)
        self._read = len(self._window)
        return new
