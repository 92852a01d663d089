"""The text of tokens that arrive one by one."""

from collections.abc import Iterable, Iterator

from ._tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Decode tokens as they come, never half a character.

    A token may end within a UTF-8 character. Of the text so far only the last U+FFFD
    can then still become something else, so that is held back until it is certain.

    **Arguments:** `tokenizer`; `tokens`, integers, for instance those a model samples.

    **Returns:** an iterator of pieces of text, none empty, which together are
    `tokenizer.decode` of all tokens (of a tokenizer whose `decode` maps each token to
    its bytes, as byte-level ones do).

    **Raises:** as `tokenizer.decode`.
    """
    settled: list[int] = []
    pending: list[int] = []
    known = 0  # characters of `settled`, and those of `pending` that were yielded
    text = ""
    for token in tokens:
        pending.append(int(token))
        text = tokenizer.decode(settled + pending)
        sure = text.removesuffix(UNKNOWN)
        if len(sure) > known:
            yield sure[known:]
            known = len(sure)
        if sure == text and text:
            # Some decoders treat the first token of a text apart, so a little of what
            # is settled stays in front of what is to come.
            settled, pending = pending, []
            text = tokenizer.decode(settled)
            known = len(text)
    if len(text) > known:
        yield text[known:]
