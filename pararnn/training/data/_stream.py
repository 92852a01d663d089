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
        while start < stop:
            base, end = int(self.starts[place]), int(self.starts[place + 1])
            if start == base:
                begins[-(stop - start)] = True
                tokens[-(stop - start)] = self.begin
                start += 1
            count = min(end, stop) - start
            if count:
                first = start - base - 1
                # Counted from the end, which stays where it is.
                there = len(tokens) - (stop - start)
                tokens[there : there + count] = self.encoded.read(
                    int(self.order[place]), first, first + count
                )
            start, place = start + count, place + 1
        return tokens, begins
