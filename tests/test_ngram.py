"""The n-gram baseline against the equation, in exact fractions, window by window."""

import collections
from fractions import Fraction
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pararnn.training import ngram_bits_per_byte
from pararnn.training.data import _ngram
from tests.documents import DOCUMENTS, packed

# Few different bytes, so that contexts recur.
LETTERS = st.lists(
    st.lists(st.sampled_from(b"abc"), min_size=1, max_size=20).map(bytes),
    min_size=1,
    max_size=6,
)


def followers_of(documents, context):
    """What followed each context of up to `context` symbols, the begin included."""
    found = collections.defaultdict(collections.Counter)
    for document in documents:
        symbols = ["begin", *document]
        for end in range(1, len(symbols)):
            for start in range(max(0, end - context), end + 1):
                found[tuple(symbols[start:end])][symbols[end]] += 1
    return found


def probability(found, context, byte):
    shorter = probability(found, context[1:], byte) if context else Fraction(1, 256)
    followers = found.get(context, collections.Counter())
    total = sum(followers.values())
    if not total:
        return shorter
    return (followers[byte] + len(followers) * shorter) / (total + len(followers))


def naive_bits(documents, windows, context):
    found, bits = followers_of(documents, context), []
    for window in windows:
        seen = []
        for token, reset, target, weight in zip(
            *(window[k].tolist() for k in ("tokens", "reset", "targets", "weights")),
            strict=True,
        ):
            seen = ["begin"] if reset else [*seen, token]
            if weight:
                before = tuple(seen[max(0, len(seen) - context) :])
                bits.append(-log2(probability(found, before, target)))
    return sum(bits) / len(bits)


@settings(max_examples=60)
@given(
    st.tuples(LETTERS | DOCUMENTS, LETTERS | DOCUMENTS),
    st.integers(2, 9),
    st.integers(0, 6),
    st.sampled_from([1, 5, 7, 1 << 22]),
)
def test_the_score_is_that_of_the_equation(documents, T, context, chunk):
    train, validation = documents
    if sum(map(len, validation)) + len(validation) <= T:
        return
    with (
        pytest.MonkeyPatch.context() as patch,
        packed(train, 1) as counted,
        packed(validation, T) as scored,
    ):
        # All that is counted in one go, or little by little.
        patch.setattr(_ngram, "TOKENS_AT_ONCE", chunk)
        score = ngram_bits_per_byte(counted, scored, context=context)
        windows = [scored[i] for i in range(len(scored))]
    expected = naive_bits(train, windows, context)
    assert score == pytest.approx(expected, rel=1e-12)


def test_a_score_worked_out_by_hand():
    # Counted: a, a, b. Empty context: 2 a, 1 b, of 2 kinds; behind the begin: 1 a;
    # behind a: 1 a, 1 b.
    a = (2 + 2 / 256) / 5
    b = (1 + 2 / 256) / 5
    expected = {
        0: -(log2(a) + log2(b)) / 2,
        1: -(log2((1 + a) / 2) + log2((1 + 2 * b) / 4)) / 2,
    }
    with packed([b"aab"], 1) as train, packed([b"ab"], 2) as validation:
        for context, bits in expected.items():
            score = ngram_bits_per_byte(train, validation, context=context)
            assert score == pytest.approx(bits, rel=1e-14)


def test_the_probabilities_of_all_bytes_sum_to_one():
    with packed([b"abracadabra"], 1) as train:
        total = 0.0
        for byte in range(256):
            with packed([b"br" + bytes([byte])], 3) as three, packed([b"br"], 2) as two:
                bits = 3 * ngram_bits_per_byte(train, three, context=2)
                total += 2 ** -(bits - 2 * ngram_bits_per_byte(train, two, context=2))
    assert total == pytest.approx(1)


def test_bytes_at_random_cost_eight_bits_and_a_cycle_none():
    noise = np.random.default_rng(0).bytes(20000)
    with packed([noise[:10000]], 1) as train, packed([noise[10000:]], 100) as rest:
        assert ngram_bits_per_byte(train, rest, context=0) == pytest.approx(8, abs=0.05)
    with packed([b"abcd" * 2000], 1) as train, packed([b"abcd" * 100], 400) as rest:
        assert ngram_bits_per_byte(train, rest, context=1) < 0.05


# name: (call of the windows, exception, parts of the message)
WRONG = {
    "too long a context": (
        lambda w: ngram_bits_per_byte(w, w, context=7),
        ValueError,
        ["context", "7", "6"],
    ),
    "a negative context": (
        lambda w: ngram_bits_per_byte(w, w, context=-1),
        ValueError,
        ["context", "-1"],
    ),
    "half a context": (
        lambda w: ngram_bits_per_byte(w, w, context=1.5),
        TypeError,
        ["context", "1.5"],
    ),
    "a corpus": (
        lambda w: ngram_bits_per_byte(w, w.corpus),
        TypeError,
        ["`validation`", "Corpus(", "Packed("],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, exception, parts = WRONG[name]
    with packed([b"text"], 1) as windows, pytest.raises(exception) as caught:
        call(windows)
    assert all(part in str(caught.value) for part in parts)
