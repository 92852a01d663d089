"""Checks of plain arguments, with the message that every caller gives."""

import operator


def check_count(where: str, name: str, value: int, least: int) -> int:
    """An integer of at least `least`; `True` is no number here."""
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None:
        raise TypeError(
            f"{where}: `{name}` is {value!r:.80}, expected an integer of at least "
            f"{least}."
        )
    if count < least:
        raise ValueError(f"{where}: `{name}` is {count}, expected at least {least}.")
    return count
