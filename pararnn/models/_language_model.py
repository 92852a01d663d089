"""A language model of residual blocks between tied embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_reset
from .._devices import gather_parameters
from .._parameters import check_dtype, check_key, check_size, wide_dtype
from ..solver import AbstractSolver, Auto, check_solver
from ._blocks import Block, make_mixer, normalise

# Repetitions of the pattern that are unrolled. Compared with a loop over single ones
# (CPU, ParaGRU of width 192, two sequences of 2048, value and gradient, medians of one
# run): for 2 repetitions 1.41 instead of 1.88 s and 203 instead of 274 MB, for 4
# repetitions 2.71 instead of 3.43 s and 378 instead of 450 MB; the same compile time.
UNROLL = 4
Mixer = str | Callable[..., Any]


class LanguageModel(eqx.Module):
    r"""Residual blocks of any recurrent layers, between tied embeddings.

    $$x^0_t = E_{\mathrm{token}_t}, \qquad x^l = \mathrm{block}_l(x^{l-1}), \qquad
      \mathrm{logits}_t = E \, \mathrm{norm}(x^L_t)$$

    A block is a mixer over time and a gated MLP, each after an RMSNorm and added to
    its input. The state is that of the mixers, and of constant size. The model follows
    the layer protocol, with tokens as inputs: unbatched, `jax.vmap` for a batch.

    Activations have the dtype of the embedding. Solves and scans inside the mixers run
    in at least float32, and so do norms and logits. For mixed precision, `cast` the
    model to bfloat16 and keep the original for the optimiser.
    """

    embedding: Float[Array, "vocab d_model"]
    head: Float[Array, "vocab d_model"] | None
    norm: Float[Array, " d_model"]
    # One entry for each mixer of the pattern; leaves stacked over its repetitions.
    blocks: tuple[Block, ...]
    repeats: int
    vocab_size: int
    d_model: int
    rematerialise: bool = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        depth: int = 2,
        *,
        mixer: Mixer | Sequence[Mixer] = "paragru",
        d_hidden: int | None = None,
        solver: AbstractSolver = Auto(),
        throw: bool = True,
        tied: bool = True,
        rematerialise: bool = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `vocab_size`, `d_model`: number of tokens, and width of the model.
        - `depth`: number of blocks.
        - `mixer`: as for [`pararnn.make_mixer`][], such as `"paragru"` or
            `"deltanet:heads=4"`; or a function `(d_model, *, key)` that returns a
            layer; or several of these, which alternate (a hybrid): their number must
            divide `depth`.
        - `d_hidden`: width of the MLP; 0 for blocks without one. Defaults to 8/3 of
            `d_model`, rounded up to a multiple of 64.
        - `solver`, `throw`: for nonlinear mixers given by name, as for
            [`pararnn.RNN`][].
        - `tied`: use the embedding as the output matrix.
        - `rematerialise`: keep only the inputs of each repetition of the mixers for
            the gradient, and compute the rest again.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype.
        - `key`: a key of `jax.random`. The embedding is drawn from
            $\mathcal{N}(0, 0.02^2)$, matrices of MLPs uniformly from
            $\pm 1 / \sqrt{\text{fan-in}}$.

        **Raises:** `ValueError` on a size that is not a positive integer, a
        number of mixers that does not divide the depth, an unknown mixer (listing those
        that exist), and what the mixers' constructors raise; `TypeError` if `solver` is
        not a solver.
        """
        where = "LanguageModel"
        check_solver(where, solver)
        self.vocab_size = check_size(where, "vocab_size", vocab_size)
        self.d_model = check_size(where, "d_model", d_model)
        pattern = _check_pattern(mixer, check_size(where, "depth", depth))
        self.repeats = depth // len(pattern)
        self.rematerialise = bool(rematerialise)
        dtype = check_dtype(where, dtype)
        check_key(where, key)
        if d_hidden is None:
            d_hidden = -(-8 * d_model // 3 // 64) * 64
        elif d_hidden != 0:
            d_hidden = check_size(where, "d_hidden", d_hidden)
        embedding, head, blocks = jr.split(key, 3)
        self.embedding = _draw_embedding(embedding, vocab_size, d_model, dtype)
        self.head = None if tied else _draw_embedding(head, vocab_size, d_model, dtype)
        self.norm = jnp.ones(d_model, dtype)

        def make(mixer: Mixer, key: PRNGKeyArray) -> Block:
            inner, outer = jr.split(key)
            if isinstance(mixer, str):
                solving = {"solver": solver, "throw": throw}
                layer = make_mixer(mixer, d_model, dtype=dtype, key=inner, **solving)
            else:
                layer = mixer(d_model, key=inner)
            return Block(layer, d_model, d_hidden, dtype=dtype, key=outer)

        keys = jr.split(blocks, (len(pattern), self.repeats))
        self.blocks = tuple(
            eqx.filter_vmap(lambda key, mixer=mixer: make(mixer, key))(keys)
            for mixer, keys in zip(pattern, keys, strict=True)
        )

    def init_state(self) -> PyTree[Array]:
        """Return the fresh state: for each mixer of the pattern its states, stacked
        over the repetitions of the pattern."""
        return tuple(
            eqx.filter_vmap(lambda block: block.mixer.init_state())(block)
            for block in self.blocks
        )

    def __call__(
        self,
        tokens: Int[Array, " T"],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T vocab"], PyTree[Array]]:
        """Return logits of the next token at every step, and the last state.

        **Arguments:** `tokens`, integers `[T]`, each in `[0, vocab_size)`; `state`,
        from `init_state()` (the default) or an earlier call; `reset`, bool `[T]`, true
        where a new document begins.

        **Returns:** `(logits, state)`, `[T, vocab_size]` in at least float32.

        **Raises:** `ValueError`, `TypeError` on tokens that are not integers `[T]` or a
        `reset` that does not fit, and what the mixers raise. A token outside of the
        vocabulary becomes NaN: linear layers pass it on to the logits from there to
        the end of the document, and the solve of a nonlinear layer raises.
        """
        logits, state, _ = self.run(tokens, state, reset=reset)
        return logits, state

    def run(
        self,
        tokens: Int[Array, " T"],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T vocab"], PyTree[Array], tuple[dict[str, Array], ...]]:
        """Return what `__call__` does, and for each mixer of the pattern the statistics
        of its solves (see [`pararnn.Solution`][]), stacked over the repetitions of the
        pattern. A linear layer has none."""
        tokens = _check_tokens(tokens, 1)
        check_reset("LanguageModel", reset, None, tokens.shape[0])
        state = self.init_state() if state is None else state
        blocks, static = eqx.partition(self.blocks, eqx.is_array)

        def repetition(xs, inputs):
            arrays, states = inputs
            states, stats = list(states), []
            for i, block in enumerate(eqx.combine(arrays, static)):
                block = gather_parameters(block)
                xs, states[i], statistics = block.run(xs, states[i], reset)
                stats.append(statistics)
            return xs, (tuple(states), tuple(stats))

        if self.rematerialise:
            repetition = jax.checkpoint(repetition)
        # `step` does not gather them: a token is smaller than the parameters.
        embedding, head = gather_parameters((self.embedding, self.head))
        xs = self._embed(tokens, embedding)
        xs, (state, stats) = lax.scan(repetition, xs, (blocks, state), unroll=UNROLL)
        return self._read_out(xs, embedding if head is None else head), state, stats

    def step(
        self, token: Int[Array, ""], state: PyTree[Array]
    ) -> tuple[Float[Array, " vocab"], PyTree[Array]]:
        """Take one step, for decoding; equals `__call__` up to rounding.

        **Arguments:** `token`, an integer; `state`, as from `init_state()`.

        **Returns:** `(logits, state)`, `[vocab_size]` in at least float32.

        **Raises:** `ValueError` on a token that is not a single integer.
        """
        token = _check_tokens(token, 0)
        blocks, static = eqx.partition(self.blocks, eqx.is_array)

        def repetition(x, inputs):
            arrays, states = inputs
            states = list(states)
            for i, block in enumerate(eqx.combine(arrays, static)):
                x, states[i] = block.step(x, states[i])
            return x, tuple(states)

        x = self._embed(token, self.embedding)
        x, state = lax.scan(repetition, x, (blocks, state))
        head = self.embedding if self.head is None else self.head
        return self._read_out(x, head), state

    def _embed(
        self, tokens: Int[Array, "*T"], embedding: Float[Array, "vocab d_model"]
    ) -> Float[Array, "*T d_model"]:
        # JAX would clamp a token that is too large, and count a negative one backwards.
        # Raising an error here would gather all tokens on one device of a mesh.
        known = (tokens >= 0) & (tokens < self.vocab_size)
        return jnp.where(known[..., None], embedding[tokens], jnp.nan)

    def _read_out(
        self, xs: Float[Array, "*T d_model"], weight: Float[Array, "vocab d_model"]
    ) -> Float[Array, "*T vocab"]:
        xs, wide = normalise(xs, self.norm), wide_dtype(xs.dtype)
        return jnp.einsum(
            "...d,vd->...v", xs, weight.astype(xs.dtype), preferred_element_type=wide
        )


def _draw_embedding(key, vocab_size: int, d_model: int, dtype) -> Array:
    draw = jr.normal(key, (vocab_size, d_model), wide_dtype(dtype))
    return (0.02 * draw).astype(dtype)


def _check_pattern(mixer: Mixer | Sequence[Mixer], depth: int) -> tuple[Mixer, ...]:
    pattern = (mixer,) if isinstance(mixer, str) or callable(mixer) else tuple(mixer)
    if not pattern or depth % len(pattern):
        raise ValueError(
            f"LanguageModel: {len(pattern)} mixers cannot alternate in `depth` = "
            f"{depth} blocks. Pass a number of mixers that divides the depth, for "
            'instance `mixer=("paragru", "deltanet")` with `depth=4`.'
        )
    return pattern


def _check_tokens(tokens, rank: int) -> Array:
    tokens = jnp.asarray(tokens)
    if tokens.ndim != rank or not jnp.issubdtype(tokens.dtype, jnp.integer):
        wanted = "[T]" if rank else "[] (one token)"
        raise ValueError(
            f"LanguageModel: tokens have shape {tokens.shape} and dtype "
            f"{tokens.dtype}, expected integers {wanted}. Likely causes: (a) a batch "
            "axis; use `jax.vmap` for it, (b) one-hot or embedded tokens, (c) one "
            "token given to `model(tokens)`, or a sequence to `model.step`."
        )
    return tokens


def cast(module: PyTree, dtype: DTypeLike) -> PyTree:
    """Cast the real floating-point leaves of a pytree to a dtype.

    **Arguments:** `module`, any pytree, such as a model; `dtype`, real floating point.

    **Raises:** `ValueError` on any other dtype.
    """
    dtype = check_dtype("cast", dtype)

    def convert(leaf):
        real = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if real else leaf

    return jax.tree.map(convert, module)
