"""Small corpora on disk, for the tests of the data."""

import contextlib
import tempfile
from pathlib import Path

from hypothesis import strategies as st

from pararnn.training import ByteTokenizer, Packed, find_corpus

# Without zeros, so that a blank window is recognised.
DOCUMENTS = st.lists(
    st.binary(min_size=1, max_size=20).map(lambda b: b.replace(b"\0", b"z")),
    min_size=1,
    max_size=8,
)


def write(folder, documents):
    """One file for each document: a mapping of names to bytes, or a list."""
    if not isinstance(documents, dict):
        documents = {f"{number}.txt": data for number, data in enumerate(documents)}
    for name, data in documents.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@contextlib.contextmanager
def packed(documents, length, **options):
    """Return the windows of documents, whose files are deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = find_corpus(write(folder, documents))
        yield Packed(corpus, ByteTokenizer(), length, **options)
