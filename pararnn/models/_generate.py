"""Generating tokens, one after the other."""

from collections.abc import Container, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._parameters import check_key, wide_dtype


def generate(
    model: Any,
    prompt: Int[Array, " P"] | Int[np.ndarray, " P"],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Container[int] = (),
    state: PyTree[Array] | None = None,
    key: PRNGKeyArray,
) -> Iterator[int]:
    r"""Continue a prompt, and yield each token as it is drawn.

    The prompt is read in parallel, in pieces whose lengths are powers of two, so that
    few programs are compiled for prompts of any length. Then each token costs one
    `model.step`, and memory stays constant.

    **Arguments:**

    - `model`: a [`pararnn.LanguageModel`][], or anything with its `__call__` and
        `step`.
    - `prompt`: integers `[P]`, at least one.
    - `max_tokens`: the largest number of tokens to draw.
    - `temperature`: logits are divided by it; 0 takes the likeliest token, or the
        first of several.
    - `top_k`: draw among the `top_k` likeliest tokens only; ties at the edge go to the
        first.
    - `top_p`: draw among the fewest of the likeliest tokens whose probabilities sum to
        `top_p` or more (Holtzman et al., 1904.09751). `top_k` is applied before
        `top_p`.
    - `stop`: tokens after which to stop; they are not returned.
    - `state`: the state to continue from. Defaults to the fresh state.
    - `key`: a key of `jax.random`. The same key gives the same tokens.

    **Returns:** an iterator of `int`.

    **Raises:** `ValueError`, at the call, on an empty prompt or one that is not integer
    `[P]`, a token outside of `model.vocab_size`, or an option outside of its range;
    `FloatingPointError`, at the token, if the logits are not finite.
    """
    read = _check_prompt(model, prompt)
    _check_options(max_tokens, temperature, top_k, top_p)
    check_key("generate", key)

    def tokens() -> Iterator[int]:
        logits, current = _read(model, read, state)
        for index in range(max_tokens):
            token = _draw(
                logits, jr.fold_in(key, index), temperature, top_k=top_k, top_p=top_p
            )
            drawn = int(token)
            if drawn < 0:
                raise FloatingPointError(
                    f"generate: the logits of token {index} are not finite. Likely "
                    "causes: (a) training had diverged when this checkpoint was "
                    "written: take an earlier one, (b) a `state` that is not finite."
                )
            if drawn in stop:
                return
            yield drawn
            if index + 1 < max_tokens:
                logits, current = _step(model, token, current)

    return tokens()


@eqx.filter_jit
def _prefill(model, tokens, state):
    logits, state = model(tokens, state)
    return logits[-1], state


@eqx.filter_jit
def _step(model, token, state):
    return model.step(token, state)


def _read(model, prompt: np.ndarray, state):
    """Return the logits after a prompt, and the state."""
    state = model.init_state() if state is None else state
    while True:
        length = 1 << (len(prompt).bit_length() - 1)
        logits, state = _prefill(model, jnp.asarray(prompt[:length]), state)
        prompt = prompt[length:]
        if not len(prompt):
            return logits, state


@eqx.filter_jit
def _draw(
    logits: Float[Array, " vocab"],
    key: PRNGKeyArray,
    temperature: float,
    *,
    top_k: int | None,
    top_p: float | None,
) -> Int[Array, ""]:
    """Draw a token; return -1 if the logits are not finite."""
    if temperature == 0:
        token = jnp.argmax(logits)
    else:
        scaled = _scale(logits, temperature)
        if top_k is not None and top_k < logits.size:
            largest, at = jax.lax.top_k(scaled, top_k)
            scaled = jnp.full_like(scaled, -jnp.inf).at[at].set(largest)
        if top_p is not None:
            scaled = _nucleus(scaled, top_p)
        token = jr.categorical(key, scaled)
    return jnp.where(jnp.all(jnp.isfinite(logits)), token, -1).astype(jnp.int32)


def _scale(logits: Float[Array, " vocab"], temperature: float) -> Array:
    """Divide logits by the temperature, with the largest shifted to 0.

    With a tiny temperature the others overflow to minus infinity, and the likeliest
    tokens remain.
    """
    wide = logits.astype(wide_dtype(logits.dtype))
    # A smaller temperature would be zero, and this one separates the same logits.
    least = float(jnp.finfo(wide.dtype).tiny)
    return (wide - jnp.max(wide)) / jnp.maximum(temperature, least)


def _nucleus(logits: Float[Array, " vocab"], top_p: float) -> Float[Array, " vocab"]:
    """Set logits outside of the likeliest tokens that sum to `top_p` to -infinity."""
    order = jnp.argsort(logits, descending=True)
    probabilities = jax.nn.softmax(logits[order])
    # A token is kept if those before it do not reach `top_p`; the first always is.
    before = jnp.cumsum(probabilities) - probabilities
    keep = jnp.zeros(logits.shape, bool).at[order].set(before < top_p)
    return jnp.where(keep, logits, -jnp.inf)


def _check_prompt(model, prompt) -> np.ndarray:
    prompt = np.asarray(prompt)
    if (
        prompt.ndim != 1
        or not np.issubdtype(prompt.dtype, np.integer)
        or not len(prompt)
    ):
        raise ValueError(
            f"generate: `prompt` has shape {prompt.shape} and dtype {prompt.dtype}, "
            "expected integers [P] with P >= 1. Likely causes: (a) text that was not "
            "encoded, (b) a batch axis, (c) an empty prompt: begin with the "
            "tokeniser's begin-of-document token."
        )
    size = getattr(model, "vocab_size", None)
    if size is not None and (prompt.min() < 0 or prompt.max() >= size):
        raise ValueError(
            f"generate: `prompt` has tokens from {prompt.min()} to {prompt.max()}, but "
            f"the model knows 0 to {size - 1}. Likely cause: another tokeniser than "
            "the model was trained with."
        )
    return prompt.astype(np.int32)


def _check_options(max_tokens, temperature, top_k, top_p) -> None:
    wrong = None
    if not isinstance(max_tokens, int) or max_tokens < 0:
        wrong = f"`max_tokens` is {max_tokens!r}, expected a whole number >= 0"
    elif not (temperature >= 0 and temperature < float("inf")):
        wrong = f"`temperature` is {temperature!r}, expected a number >= 0"
    elif top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        wrong = f"`top_k` is {top_k!r}, expected a whole number >= 1 or None"
    elif top_p is not None and not 0 < top_p <= 1:
        wrong = f"`top_p` is {top_p!r}, expected a number in (0, 1] or None"
    if wrong is not None:
        raise ValueError(f"generate: {wrong}.")
