"""Text to tokens and back, and the file of encoded documents."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, strategies as st

from pararnn.training import (
    ByteTokenizer,
    FileTokenizer,
    Packed,
    find_corpus,
    stream_text,
)
from pararnn.training.data import _packed
from tests.documents import write

TEXT = "the cat and the hat; Größe, naïve, 木, 🙂\n" * 3
SPECIAL = ["<s>", "</s>"]


def train(path, special=SPECIAL):
    """Train a small byte-pair tokenizer, and write it to a file."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.save(str(path))
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(path)
    return path


@pytest.fixture(scope="module", params=["bytes", "file"])
def tokenizer(request, path):
    return ByteTokenizer() if request.param == "bytes" else FileTokenizer(path)


# Text ---------------------------------------------------------------------------------


@given(text=st.text(max_size=40) | st.sampled_from([TEXT, "<s> is text </s>"]))
def test_a_text_comes_back(tokenizer, text):
    for given_ in (text, text.encode()):
        tokens = tokenizer.encode(given_)
        assert tokens.dtype == np.int32 and tokens.ndim == 1
        assert all(0 <= t < tokenizer.vocab_size for t in tokens)
        assert tokenizer.begin not in tokens
        assert tokenizer.decode(tokens) == text
    framed = [tokenizer.begin, *tokens.tolist(), tokenizer.begin]
    assert tokenizer.decode(framed) == text


@given(st.binary(max_size=40))
def test_bytes_are_tokens(data):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(data).tolist() == list(data)
    assert tokenizer.decode(list(data)) == data.decode("utf-8", "replace")
    assert (tokenizer.vocab_size, tokenizer.begin) == (257, 256)


# Whole characters, parts of them, and bytes that are not characters.
PARTS = st.lists(
    st.sampled_from([*"aé木🙂\ufffd"]).map(str.encode)
    | st.binary(max_size=3)
    | st.sampled_from([b"\xf0\x9f", b"\xe6\x9c", b"\xf0\x9f\x99", b"\xc3"])
).map(b"".join)


@given(data=PARTS)
def test_streamed_text_is_the_text(data):
    pieces = list(stream_text(ByteTokenizer(), iter([256, *data])))
    assert "".join(pieces) == data.decode("utf-8", "replace")
    assert all(pieces)


@given(text=st.text(max_size=30) | st.just(TEXT))
def test_streamed_tokens_never_show_half_a_character(tokenizer, text):
    pieces = list(stream_text(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_not_held_back_longer_than_a_character():
    pieces = stream_text(ByteTokenizer(), "aé木b".encode())
    assert list(pieces) == ["a", "é", "木", "b"]


# Files of tokenizers ------------------------------------------------------------------


def test_options_of_the_file_do_not_cut_or_pad_documents(path, tmp_path):
    made = tokenizers.Tokenizer.from_file(str(path))
    made.enable_truncation(4)
    made.enable_padding(length=500)
    made.save(str(tmp_path / "tokenizer.json"))
    cutting = FileTokenizer(tmp_path / "tokenizer.json")
    assert cutting.decode(cutting.encode(TEXT)) == TEXT
    assert len(cutting.encode("a")) == 1
    assert cutting.identity == FileTokenizer(path).identity


def test_the_begin_token(path, tmp_path, monkeypatch):
    made = tokenizers.Tokenizer.from_file(str(path))
    assert FileTokenizer(path).begin == made.token_to_id("<s>")
    chosen = FileTokenizer(path, begin="</s>")
    assert chosen.begin == made.token_to_id("</s>")
    assert chosen.identity != FileTokenizer(path).identity
    monkeypatch.setenv("HOME", str(path.parent))
    assert FileTokenizer("~/tokenizer.json").begin == made.token_to_id("<s>")


def test_ids_with_gaps_are_below_the_size_of_the_vocabulary(path, tmp_path):
    content = json.loads(path.read_text())
    content["model"]["vocab"]["gap"] = 1000
    (tmp_path / "gaps.json").write_text(json.dumps(content))
    assert FileTokenizer(tmp_path / "gaps.json").vocab_size == 1001


# Encoded documents --------------------------------------------------------------------

DOCUMENTS = [TEXT.encode(), "Größe".encode(), b"x", TEXT[::-1].encode()]


@pytest.fixture
def corpus(tmp_path):
    return find_corpus(write(tmp_path / "corpus", DOCUMENTS))


def documents_of(packed):
    tokens, begins = packed.read(0, packed.num_tokens)
    assert begins[0] and all(tokens[begins] == packed.tokenizer.begin)
    parts = np.split(tokens, np.flatnonzero(begins)[1:])
    return sorted(packed.tokenizer.decode(part[1:]).encode() for part in parts)


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 24])
def test_encoded_documents_are_the_documents(
    piece, path, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(_packed, "PIECE", piece)
    tokenizer = FileTokenizer(path)
    packed = Packed(corpus, tokenizer, 4, cache=tmp_path / "cache")
    assert documents_of(packed) == sorted(DOCUMENTS)
    targets = packed.num_tokens - len(DOCUMENTS)
    assert packed.bytes_per_target == sum(map(len, DOCUMENTS)) / targets
    if piece > 1000:
        tokens = sum(len(tokenizer.encode(document)) for document in DOCUMENTS)
        assert targets == tokens


def test_one_half_of_a_document_is_encoded_alone(path, tmp_path):
    text = TEXT.encode() * 5
    corpus = find_corpus(write(tmp_path / "corpus", [text]))
    options = dict(cache=tmp_path / "cache")
    halves = [Packed(c, FileTokenizer(path), 4, **options) for c in corpus.split(0.4)]
    assert b"".join(documents_of(half)[0] for half in halves) == text


def test_bytes_are_worth_one_byte_each(corpus):
    assert Packed(corpus, ByteTokenizer(), 4).bytes_per_target == 1.0


class Counting:
    """A user's own tokenizer, which counts how often it is called."""

    vocab_size, begin, identity = 0x110001, 0x110000, "counting"

    def __init__(self):
        self.asked = 0

    def encode(self, text):
        self.asked += 1
        return np.array([ord(letter) for letter in text], np.int64)

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def test_documents_are_encoded_once(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    counting = Counting()
    asked = []
    for other in (None, "seed", "files", "tokenizer"):
        if other == "files":
            os.utime(corpus.root / "0.txt", (1, 1))
        if other == "tokenizer":
            counting.identity = "another"
        Packed(corpus, counting, 4, seed=0 if other is None else 1)
        asked.append(counting.asked)
    assert asked == [4, 4, 8, 12]
    assert len(list((tmp_path / "home/pararnn/tokens").iterdir())) == 3


def test_an_interrupted_encoding_leaves_nothing(corpus, tmp_path, monkeypatch):
    class Interrupted(Counting):
        def encode(self, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Packed(corpus, Interrupted(), 4, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    packed = Packed(corpus, Counting(), 4, cache=tmp_path / "cache")
    assert documents_of(packed) == sorted(DOCUMENTS)


def test_two_processes_may_encode_at_once(corpus, tmp_path):
    class Overtaken(Counting):
        def encode(self, text):
            if not self.asked:
                Packed(corpus, Counting(), 4, cache=tmp_path / "cache")
            return super().encode(text)

    packed = Packed(corpus, Overtaken(), 4, cache=tmp_path / "cache")
    assert documents_of(packed) == sorted(DOCUMENTS)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_bytes_that_are_not_text_are_reported(path, tmp_path):
    corpus = find_corpus(write(tmp_path / "corpus", [b"a\xff", b"good"]))
    with pytest.warns(UserWarning, match=r"1 documents are not valid UTF-8.*'0\.txt'"):
        packed = Packed(corpus, FileTokenizer(path), 2, cache=tmp_path / "cache")
    assert documents_of(packed) == ["a\ufffd".encode(), b"good"]


# What goes wrong ----------------------------------------------------------------------


def test_a_damaged_cache_is_refused(corpus, tmp_path):
    Packed(corpus, Counting(), 4, cache=tmp_path)
    (file,) = tmp_path.glob("*/tokens.npy")
    np.save(file, np.load(file)[:-1])
    with pytest.raises(ValueError, match=r"damaged.*Delete the folder"):
        Packed(corpus, Counting(), 4, cache=tmp_path)


def test_a_tokenizer_that_leaves_its_vocabulary_is_refused(corpus, tmp_path):
    small = Counting()
    small.vocab_size, small.begin = 100, 99
    with pytest.raises(ValueError, match=r"tokens from .* to .*vocab_size. is 100"):
        Packed(corpus, small, 4, cache=tmp_path)


def test_a_begin_token_outside_of_the_vocabulary_is_refused(corpus, tmp_path):
    outside = Counting()
    outside.begin = outside.vocab_size
    with pytest.raises(ValueError, match="leaves out the special tokens"):
        Packed(corpus, outside, 4, cache=tmp_path)


def no_begin(path):
    train(path.parent / "no_begin.json", special=["<pad>"])
    return FileTokenizer(path.parent / "no_begin.json")


# name: (call of the file, exception, parts of the message)
WRONG = {
    "a missing file": (
        lambda p: FileTokenizer(p.parent / "no.json"),
        FileNotFoundError,
        ["no.json", "tokenizer.json"],
    ),
    "a folder": (
        lambda p: FileTokenizer(p.parent),
        FileNotFoundError,
        ["this is its folder"],
    ),
    "another file": (
        lambda p: FileTokenizer(__file__),
        ValueError,
        [Path(__file__).name, "tokenizer_config.json"],
    ),
    "no begin token": (no_begin, ValueError, ["<s>", "<pad>", "begin="]),
    "an unknown begin token": (
        lambda p: FileTokenizer(p, begin="<go>"),
        ValueError,
        ["'<go>'", "</s>"],
    ),
    "bytes that are no text": (
        lambda p: FileTokenizer(p).encode(b"\xff"),
        ValueError,
        ["not UTF-8", "ByteTokenizer"],
    ),
    "a number to encode": (
        lambda p: FileTokenizer(p).encode(3),
        TypeError,
        ["3", "expected a string or bytes"],
    ),
    "a list to encode": (
        lambda p: ByteTokenizer().encode([1]),
        TypeError,
        ["[1]", "expected a string or bytes"],
    ),
    "a token too many": (
        lambda p: ByteTokenizer().decode([1, 257]),
        ValueError,
        ["from 1 to 257", "0 to 256"],
    ),
    "a negative token": (
        lambda p: FileTokenizer(p).decode([-1]),
        ValueError,
        ["from -1", "another tokenizer"],
    ),
    "half a token": (
        lambda p: ByteTokenizer().decode([0.5]),
        TypeError,
        ["float64[1]", "integers"],
    ),
    "a batch": (
        lambda p: ByteTokenizer().decode(np.zeros((2, 3), int)),
        TypeError,
        ["int64[2, 3]", "one by one"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name, path):
    call, exception, parts = WRONG[name]
    with pytest.raises(exception) as caught:
        call(path)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_without_the_package_the_error_names_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        FileTokenizer(path)
