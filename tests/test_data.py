"""From files to batches: their contents, what is dropped, and resuming."""

import collections
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pararnn.training import (
    ByteTokenizer,
    Corpus,
    Packed,
    find_corpus,
    make_batches,
)
from tests.documents import DOCUMENTS, packed, write
from tests.helpers import refusal

LENGTHS = st.integers(1, 9)
FILES = {
    "b.txt": b"bb",
    "a.py": b"a",
    "deep/er/c.py": b"ccc",
    "deep/d[1].py": b"dddd",
    "empty.py": b"",
    ".hidden/e.py": b"e",
    "deep/.f.py": b"f",
}
# path below the folder: the names found, relative to their root
FOUND = {
    "": ["a.py", "b.txt", "deep/d[1].py", "deep/er/c.py"],
    "b.txt": ["b.txt"],
    "deep/d[1].py": ["d[1].py"],
    "*.py": ["a.py"],
    "**/*.py": ["a.py", "deep/d[1].py", "deep/er/c.py"],
    "**": ["a.py", "b.txt", "deep/d[1].py", "deep/er/c.py"],
    "deep/[a-f]*/?.py": ["er/c.py"],
    "deep": ["d[1].py", "er/c.py"],
}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


# Finding files ------------------------------------------------------------------------


@pytest.mark.parametrize("path", FOUND)
@pytest.mark.parametrize("home", [False, True])
def test_a_path_stands_for_its_files(path, home, tmp_path, monkeypatch):
    write(tmp_path, FILES)
    monkeypatch.setenv("HOME", str(tmp_path))
    corpus = find_corpus(f"~/{path}" if home else tmp_path / path)
    assert list(corpus.names) == FOUND[path]
    for i, name in enumerate(corpus.names):
        content = Path(corpus.root, name).read_bytes()
        assert corpus.read(i, 0, len(content)) == content
    assert corpus.num_bytes == sum(len(FILES[n]) for n in FILES if is_in(n, corpus))


def is_in(name, corpus):
    return any(name.endswith(found) for found in corpus.names)


def test_the_default_is_the_source_of_the_standard_library():
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus = find_corpus()
    assert {"os.py", "json/decoder.py"} <= set(corpus.names)
    assert list(corpus.names) == sorted(corpus.names)
    third_party = root.rglob("*-packages/*")
    assert not set(corpus.names) & {p.relative_to(root).as_posix() for p in third_party}
    size = (root / "os.py").stat().st_size
    assert corpus.sizes[corpus.names.index("os.py")] == size


def test_a_copy_in_another_folder_is_the_same_corpus(tmp_path):
    one, two = (find_corpus(write(tmp_path / d, FILES)) for d in "ab")
    assert one.identity == two.identity
    (tmp_path / "b" / "a.py").write_bytes(b"aa")
    assert find_corpus(tmp_path / "b").identity != one.identity


# Splitting ----------------------------------------------------------------------------


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_is_a_partition_by_hashes_of_the_names(count, fraction, seed):
    corpus = corpus_of([f"{i}.txt" for i in range(count)])
    parts = corpus.split(fraction, seed=seed)
    train, validation = (set(part.names) for part in parts)
    assert train | validation == set(corpus.names)
    assert not train & validation and train and validation
    wanted = {name for name in corpus.names if hash_of(name, seed) < fraction}
    if 0 < len(wanted) < count:
        assert validation == wanted


def corpus_of(names):
    sizes = np.full(len(names), 10)
    return Corpus(Path("."), tuple(names), np.zeros_like(sizes), sizes, sizes)


def hash_of(name, seed):
    text = f"split\0{seed}\0{name}".encode()
    return int(hashlib.blake2b(text, digest_size=8).hexdigest(), 16) / 2**64


def test_a_document_stays_on_its_side_when_others_are_added():
    names = [f"{i}.txt" for i in range(300)]
    _, few = corpus_of(names[:200]).split(0.3)
    _, all_ = corpus_of(names).split(0.3)
    assert set(few.names) == set(all_.names) & set(names[:200])


@given(st.binary(min_size=2, max_size=200), st.floats(0.01, 0.99))
def test_a_single_document_is_cut_in_two(content, fraction):
    with packed([content], 1) as windows:
        train, validation = windows.corpus.split(fraction)
        halves = [part.read(0, 0, part.num_bytes) for part in (train, validation)]
        assert b"".join(halves) == content and all(halves)
        at = min(max(round(len(content) * (1 - fraction)), 1), len(content) - 1)
        if b"\n" in content[at:-1]:
            assert halves[0].endswith(b"\n") and b"\n" not in halves[0][at:-1]
        tokens, _ = Packed(validation, ByteTokenizer(), 1).read(1, len(halves[1]) + 1)
        assert tokens.astype(np.uint8).tobytes() == halves[1]


# Packing ------------------------------------------------------------------------------


@given(DOCUMENTS, LENGTHS, st.integers(0, 3))
def test_windows_are_the_stream_of_the_documents(documents, T, seed):
    with packed(documents, 1, seed=seed) as windows:
        stream = [int(windows[0]["tokens"][0])]
        stream += [int(windows[i]["targets"][0]) for i in range(len(windows))]
        if len(stream) <= T:
            return
        check_windows(Packed(windows.corpus, ByteTokenizer(), T, seed=seed), stream, T)
    # Every document once, each after a begin token, and nothing else.
    assert stream[0] == 256
    text = "".join(chr(token) for token in stream)
    found = [piece.encode("latin-1") for piece in text.split(chr(256))[1:]]
    assert sorted(found) == sorted(documents)


def check_windows(windows, stream, T):
    assert windows.num_tokens == len(stream)
    assert len(windows) == sum((i + 1) * T < len(stream) for i in range(200))
    for i in range(len(windows)):
        window, here = windows[i], stream[i * T : i * T + T + 1]
        assert {k: str(v.dtype) for k, v in window.items()} == {
            "tokens": "int32",
            "targets": "int32",
            "reset": "bool",
            "weights": "float32",
        }
        assert window["tokens"].tolist() == here[:-1]
        assert window["targets"].tolist() == here[1:]
        assert window["reset"].tolist() == [token == 256 for token in here[:-1]]
        assert window["weights"].tolist() == [token != 256 for token in here[1:]]


def test_the_order_of_documents_depends_on_the_seed_only():
    documents = [bytes([65 + i]) for i in range(20)]
    orders = []
    for seed in (0, 0, 1):
        with packed(documents, 1, seed=seed) as windows:
            orders.append(windows.read(0, windows.num_tokens)[0].tolist())
    assert orders[0] == orders[1] != orders[2]


# Batches ------------------------------------------------------------------------------


def rows(batches):
    """The windows of all batches, without blank ones."""
    found = [
        {key: array[row] for key, array in batch.items()}
        for batch in batches
        for row in range(len(batch["tokens"]))
    ]
    return [row for row in found if row["tokens"].any()]


def counted(windows):
    return collections.Counter(
        b"|".join(window[key].tobytes() for key in sorted(window)) for window in windows
    )


@settings(max_examples=30)
@given(DOCUMENTS, LENGTHS, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_an_epoch_of_all_hosts_has_every_window_once(documents, T, B, hosts, shuffle):
    if sum(map(len, documents)) + len(documents) <= T:
        return
    with packed(documents, T) as windows:
        options = dict(epochs=1, shuffle=shuffle, threads=0)
        by_host = [
            list(make_batches(windows, B, shard=(host, hosts), **options))
            for host in range(hosts)
        ]
        every = [windows[i] for i in range(len(windows))]
    assert counted(rows(itertools.chain(*by_host))) == counted(every)
    assert {len(batches) for batches in by_host} == {
        math.ceil(math.ceil(len(every) / hosts) / B)
    }
    for batch in itertools.chain(*by_host):
        assert {array.shape for array in batch.values()} == {(B, T)}
        blank = ~batch["tokens"].any(axis=1)
        assert not batch["weights"][blank].any() and not batch["reset"][blank].any()
    if not shuffle and hosts == 1:
        assert all(map(same, rows(by_host[0]), every))


def test_every_epoch_has_an_order_of_its_own():
    with packed([bytes(range(1, 101))], 2) as windows:
        n = len(windows)
        one, two, three = (
            list(make_batches(windows, 1, seed=seed, epochs=epochs))
            for seed, epochs in ((0, 2), (0, 2), (7, 1))
        )
    first, second = one[:n], one[n:]
    assert counted(rows(first)) == counted(rows(second)) == counted(rows(three))
    assert all(map(same, one, two))
    assert not all(map(same, first, second))
    assert not all(map(same, first, three))


@settings(max_examples=15)
@given(
    DOCUMENTS,
    st.integers(1, 4),
    st.integers(0, 6),
    st.sampled_from([(0, 0), (2, 4), (3, 1)]),
)
def test_a_run_goes_on_where_it_stopped(documents, B, stop, reading):
    threads, prefetch = reading
    with packed(documents, 1) as windows:
        batches = make_batches(windows, B, threads=threads, prefetch=prefetch)
        whole = iter(batches)
        expected = [next(whole) for _ in range(8)]
        begun = iter(batches)
        for _ in range(stop):
            next(begun)
        state = json.loads(json.dumps(begun.get_state()))
        # In a new iterator, and in one that has advanced further.
        for later in (iter(make_batches(windows, B, threads=0)), whole):
            later.set_state(state)
            assert all(same(next(later), batch) for batch in expected[stop:])


def test_grain_saves_and_restores_the_place_for_orbax(windows, tmp_path):
    saved, restored = (iter(make_batches(windows, 2)) for _ in range(2))
    next(saved)
    handler = grain.checkpoint.CheckpointHandler()
    handler.save(tmp_path, item=saved)
    assert same(next(handler.restore(tmp_path, item=restored)), next(saved))


def test_more_steps_of_grain_can_follow():
    with packed([b"some text of one document"], 4) as windows:
        batches = make_batches(windows, 2, epochs=1)
        lengths = batches.map(lambda batch: batch["tokens"].shape)
        assert isinstance(lengths, grain.IterDataset)
        assert set(lengths) == {(2, 4)}


# What goes wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"longer than before", b"short", None])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_that_changes_is_noticed(content, threads, tmp_path):
    path = Path(write(tmp_path, [b"0123456789"]), "0.txt")
    windows = Packed(find_corpus(path), ByteTokenizer(), 2)
    assert len(windows) == 5
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"'0\.txt'.* had 10 bytes"):
        next(iter(make_batches(windows, 1, threads=threads)))


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("corpus"), [b"one document", b"another"])
    return Packed(find_corpus(folder), ByteTokenizer(), 4)


@pytest.mark.parametrize(
    "change",
    [
        dict(batch_size=3),
        dict(seed=1),
        dict(shuffle=False),
        dict(shard=(0, 2)),
        dict(length=3),
        dict(order=1),
        dict(text=b"one longer document"),
    ],
    ids=str,
)
def test_a_place_in_other_data_is_refused(change, windows, tmp_path):
    state = iter(make_batches(windows, 2)).get_state()
    now = {"text": b"one document", "order": 0, "length": 4, "batch_size": 2, **change}
    corpus = find_corpus(write(tmp_path, [now.pop("text"), b"another"]))
    tokenizer, length, order = ByteTokenizer(), now.pop("length"), now.pop("order")
    other = Packed(corpus, tokenizer, length, seed=order)
    iterator = iter(make_batches(other, **now))
    with pytest.raises(ValueError, match="a position in other data"):
        iterator.set_state(state)


def nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def empty(tmp_path):
    return write(tmp_path, {"a": b"", "b": b""})


def dangling(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "link")
    return tmp_path


def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


# name: (what makes the path, exception, parts of the message)
WRONG_PATHS = {
    "missing": (lambda p: p / "no.txt", FileNotFoundError, ["no.txt", "no folder"]),
    "no files": (nothing, FileNotFoundError, ["no files", "folder", "hidden"]),
    "no match": (lambda p: p / "*.txt", FileNotFoundError, ["*.txt", "**"]),
    "empty files": (empty, ValueError, ["all 2 files", "empty", "'a'"]),
    "a dangling link": (dangling, OSError, ["cannot be read", "link"]),
    "a pipe": (pipe, OSError, ["cannot be read", "pipe"]),
    "a number": (lambda p: 3, TypeError, ["3", "a folder, or a pattern"]),
    "a list": (lambda p: [p], TypeError, ["pattern that fits all"]),
    "bytes": (lambda p: b"a", TypeError, ["b'a'"]),
}


@pytest.mark.parametrize("name", WRONG_PATHS)
def test_wrong_paths(name, tmp_path):
    make, exception, parts = WRONG_PATHS[name]
    with pytest.raises(exception) as caught:
        find_corpus(make(tmp_path))
    assert all(part in str(caught.value) for part in ["find_corpus", *parts])


# name: (call of the windows, exception, parts of the message)
WRONG = {
    "all of it": (lambda w: w.corpus.split(1.0), ValueError, ["fraction", "1.0"]),
    "nothing of it": (lambda w: w.corpus.split(0), ValueError, ["fraction", "0"]),
    "no number": (lambda w: w.corpus.split("5%"), ValueError, ["fraction", "5%"]),
    "a seed of a half": (lambda w: w.corpus.split(seed=0.5), TypeError, ["seed"]),
    "one byte": (
        lambda w: Corpus(Path("."), ("a",), *3 * [np.ones(1, int)]).split(),
        ValueError,
        ["single byte", "'a'"],
    ),
    "a corpus without documents": (
        lambda w: w.corpus.take(np.zeros(0, int)),
        ValueError,
        ["0 names", "find_corpus"],
    ),
    "bytes that are not there": (
        lambda w: w.corpus.read(0, 3, 99),
        ValueError,
        ["3 to 99", "'0.txt'", "12"],
    ),
    "a path for a corpus": (
        lambda w: Packed("a.txt", ByteTokenizer(), 4),
        TypeError,
        ["'a.txt'", "find_corpus(path)"],
    ),
    "both parts of a split": (
        lambda w: Packed(w.corpus.split(), ByteTokenizer(), 4),
        TypeError,
        ["one of them"],
    ),
    "no tokenizer": (
        lambda w: Packed(w.corpus, "bytes", 4),
        TypeError,
        ["'bytes'", "vocab_size", "ByteTokenizer()"],
    ),
    "the class of a tokenizer": (
        lambda w: Packed(w.corpus, ByteTokenizer, 4),
        TypeError,
        ["the call of the class"],
    ),
    "no length": (lambda w: Packed(w.corpus, ByteTokenizer(), 0), ValueError, ["leng"]),
    "a corpus that is too short": (
        lambda w: Packed(w.corpus, ByteTokenizer(), 21),
        ValueError,
        ["2 documents of 19 bytes are 21 tokens", "length=21", "22"],
    ),
    "a window too far": (lambda w: w[5], IndexError, ["window 5 of 5"]),
    "a window from the end": (lambda w: w[-1], IndexError, ["-1"]),
    "a stream too far": (lambda w: w.read(0, 22), ValueError, ["0 to 22", "21"]),
    "batches of a corpus": (
        lambda w: make_batches(w.corpus, 2),
        TypeError,
        ["Packed(corpus"],
    ),
    "an empty batch": (lambda w: make_batches(w, 0), ValueError, ["batch_size", "0"]),
    "a batch of 1.5": (lambda w: make_batches(w, 1.5), TypeError, ["batch_size"]),
    "a true batch": (lambda w: make_batches(w, True), TypeError, ["batch_size"]),
    "a seed of 33 bits": (
        lambda w: make_batches(w, 2, seed=2**32),
        ValueError,
        ["seed", "4294967296", "2**32"],
    ),
    "no epochs": (lambda w: make_batches(w, 2, epochs=0), ValueError, ["epochs"]),
    "fewer threads than none": (
        lambda w: make_batches(w, 2, threads=-1),
        ValueError,
        ["threads", "-1"],
    ),
    "a shard too far": (
        lambda w: make_batches(w, 2, shard=(2, 2)),
        ValueError,
        ["(2, 2)", "(index, count)"],
    ),
    "a shard of nothing": (
        lambda w: make_batches(w, 2, shard=(0, 0)),
        ValueError,
        ["shard[1]"],
    ),
    "half a shard": (lambda w: make_batches(w, 2, shard=1), TypeError, ["shard", "1"]),
    "a state without a place": (
        lambda w: iter(make_batches(w, 2)).set_state({"next_index": 0}),
        ValueError,
        ["a position in other data"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name, windows):
    call, exception, parts = WRONG[name]
    with refusal(exception, parts):
        call(windows)


def test_without_grain_the_error_names_the_extra(monkeypatch):
    for module in [m for m in sys.modules if m.startswith("pararnn.training")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'pararnn\[train\]'"):
        __import__("pararnn.training")


def test_the_library_alone_needs_none_of_the_extra():
    heavy = ("grain", "optax", "orbax", "rich", "tyro", "matplotlib", "tokenizers")
    code = f"import sys, pararnn; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
