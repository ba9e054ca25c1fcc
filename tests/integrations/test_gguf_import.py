"""The tokenizer built from a GGUF file, against an independent byte-level BPE over the same merges."""

import json
from itertools import pairwise

import numpy as np
import pytest
import regex
from gguf import GGUFReader
from tokenizers import Tokenizer

from zerokl.integrations.gguf_import import convert_gguf, hugging_face_name, unpermute_rotary_rows
from zerokl.integrations.smollm2 import fetch_gguf, model_folder

ODD_STRINGS = [
    "",
    " ",
    "  17",
    "a   1b",
    "1234567890",
    "3.14159 2,718 x10^23",
    "Hello, world!",
    "I'm you're we've they'll he'd it's DON'T",
    "tabs\tand\nnew\r\nlines\n\n\n  indented",
    "trailing spaces   ",
    "   leading spaces",
    "def f(x):\n    return x ** 2  # comment\n",
    "for (int i = 0; i < 10; ++i) { a[i] = i << 2; }",
    "naïve café – “quotes” … ¿qué?",
    "Здравствуй, мир! 你好，世界。 こんにちは 안녕",
    "مرحبا بالعالم ١٢٣ Ⅷ ½ ²",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 😀😀",
    "zero\u200bwidth \u00a0nbsp \u3000ideographic",
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|im_end|> text <|not_a_token|>",
    "a" * 200,
    "\x00\x01\x7f control",
    "e\u0301 combining vs \u00e9",
    "http://example.com/path?x=1&y=2#frag",
    "\\frac{1}{2} \\sum_{i=0}^{n} $x_i$",
]


def byte_alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


class PlainBpe:
    """Greedy lowest-rank merging, written from the definition; shares nothing with the `tokenizers` library."""

    split = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, tokens, merges, types):
        self.vocab = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.special = {token: i for i, token in enumerate(tokens) if types[i] == 3}  # 3: control token
        self.bytes = byte_alphabet()

    def encode(self, text):
        pattern = "(" + "|".join(regex.escape(token) for token in self.special) + ")"
        ids = []
        for part in regex.split(pattern, text):
            ids += [self.special[part]] if part in self.special else self.encode_plain(part)
        return ids

    def encode_plain(self, text):
        ids = []
        for digits_apart in regex.findall(r"\p{N}|[^\p{N}]+", text):
            for word in self.split.findall(digits_apart):
                ids += [self.vocab[piece] for piece in self.merge([self.bytes[b] for b in word.encode()])]
        return ids

    def merge(self, pieces):
        while len(pieces) > 1:
            ranked = [(self.ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(pairwise(pieces))]
            rank, i = min(ranked)
            if rank == len(self.ranks):
                break
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        return pieces


@pytest.fixture(scope="module")
def tokenizer_path(smollm2_folder):
    return smollm2_folder / "tokenizer.json"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """(tokens, merges, token types) out of the GGUF file itself, past everything that the conversion does."""
    fields = GGUFReader(fetch_gguf(tmp_path_factory.mktemp("gguf"))).fields
    return tuple(fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))


def test_tokenizer_equals_plain_bpe_on_odd_strings(tokenizer_path, vocabulary):
    fast = Tokenizer.from_file(str(tokenizer_path))
    plain = PlainBpe(*vocabulary)
    assert fast.get_vocab(with_added_tokens=True) == plain.vocab
    for text in ODD_STRINGS:
        assert fast.encode(text, add_special_tokens=False).ids == plain.encode(text), repr(text)


def test_tokenizer_round_trips_text(tokenizer_path):
    fast = Tokenizer.from_file(str(tokenizer_path))
    for text in ODD_STRINGS:
        assert fast.decode(fast.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_plain_byte_level_differs(tokenizer_path):
    """The negative control: without the digit rule the ids of '  17' and 'a   1b' are others."""
    description = json.loads(tokenizer_path.read_text(encoding="utf-8"))
    right = Tokenizer.from_str(json.dumps(description))
    description["pre_tokenizer"]["pretokenizers"].pop(0)
    wrong = Tokenizer.from_str(json.dumps(description))
    for text in ("  17", "a   1b"):
        assert right.encode(text).ids != wrong.encode(text).ids


def test_rotary_rows_return_to_half_split_order():
    heads, size, columns = 3, 8, 5
    rows = np.arange(heads * size * columns, dtype=np.float32).reshape(heads * size, columns)
    stored = (
        rows.reshape(heads, 2, size // 2, columns).swapaxes(1, 2).reshape(rows.shape)
    )  # what the converter to GGUF does
    assert not np.array_equal(stored, rows)
    np.testing.assert_array_equal(unpermute_rotary_rows(stored, heads), rows)


def test_unknown_tensor_is_named():
    assert hugging_face_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=r"blk\.0\.ssm_a"):
        hugging_face_name("blk.0.ssm_a")


def test_a_folder_with_something_in_it_is_never_replaced(tmp_path, monkeypatch):
    kept = tmp_path / "thesis.txt"
    kept.write_text("years of work")
    with pytest.raises(ValueError, match="must be absent or an empty folder"):
        convert_gguf(tmp_path / "any.gguf", tmp_path)
    monkeypatch.setattr("zerokl.integrations.smollm2.fetch_gguf", lambda scratch: pytest.fail("fetched in vain"))
    with pytest.raises(ValueError, match="must be absent or an empty folder"):
        model_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
