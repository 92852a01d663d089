"""All documents as one sequence of tokens, each behind a begin token."""

import numpy as np

from ._encoded import Encoded


class Stream:
    """Documents one behind the other, in a given order, read by position.

    `starts`, int64 `[documents + 1]`, holds the position of each begin token, and the
    length of the stream.
    """

    def __init__(self, encoded: Encoded, order: np.ndarray, begin: int):
        self.encoded, self.order, self.begin = encoded, order, begin
        self.starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(encoded.lengths[order] + 1, out=self.starts[1:])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens at `[start, stop)`, int32, and where documents begin, bool."""
        tokens = np.empty(stop - start, np.int32)
        begins = np.zeros(stop - start, bool)
        place = int(np.searchsorted(self.starts, start, side="right")) - 1
        at = start
        while at < stop:
            base, end = int(self.starts[place]), int(self.starts[place + 1])
            if at == base:
                tokens[at - start], begins[at - start] = self.begin, True
                at += 1
            end = min(end, stop)
            # Behind the begin token, which is none of the document's own.
            first = base + 1
            if at < end:
                document = int(self.order[place])
                found = self.encoded.read(document, at - first, end - first)
                tokens[at - start : end - start] = found
            at, place = end, place + 1
        return tokens, begins
