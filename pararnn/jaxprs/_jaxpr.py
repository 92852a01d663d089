"""Programs of JAX, jaxprs, as data: what is in them, parts of them, their values.

Here a program has no constants of its own: what a function closes over are its first
arguments. (JAX up to 0.10 keeps them apart from the arguments, without their values;
from 0.11 on a jaxpr holds the values too, and must not where they are tracers.)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

# What a function that was jitted inside of another is called.
JITTED = frozenset(("jit", "pjit"))


def inner_jaxprs(params: dict[str, Any]) -> Iterator[jex.core.Jaxpr]:
    """The programs within an equation: bodies of loops, branches, called functions."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.core.Jaxpr):
                yield item


def is_index(constant: Any) -> bool:
    """Whether it holds known whole numbers, as tables of indices and masks do.

    Their values are read where a structure is looked for; of others only the shape is.
    """
    kind = getattr(getattr(constant, "dtype", None), "kind", "")
    return kind in tuple("biu") and not isinstance(constant, Tracer)


def called_jaxpr(eqn) -> Any:
    """The program of a called function, with its constants where it has them."""
    return eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]


def primitives_of(program: jex.core.Jaxpr) -> set[str]:
    """The names of all that it does, inner programs included."""
    found = set()
    for eqn in program.eqns:
        found.add(eqn.primitive.name)
        found |= primitives_within(eqn)
    return found


def primitives_within(eqn) -> set[str]:
    """The names of all that the inner programs of an equation do."""
    return set().union(*map(primitives_of, inner_jaxprs(eqn.params)))


def variables(atoms: Sequence) -> list[jex.core.Var]:
    """Those that are no literals, each once."""
    return list(dict.fromkeys(v for v in atoms if isinstance(v, jex.core.Var)))


def dependents_of(program: jex.core.Jaxpr, start) -> set[jex.core.Var]:
    """All that depends on some variables, they themselves included."""
    found = set(start)
    for eqn in program.eqns:
        if not found.isdisjoint(variables(eqn.invars)):
            found.update(eqn.outvars)
    return found


def read_by(eqns) -> set[jex.core.Var]:
    return {v for eqn in eqns for v in variables(eqn.invars)}


def written_by(eqns) -> list[jex.core.Var]:
    return [v for eqn in eqns for v in eqn.outvars]


def sub_jaxpr(program: jex.core.Jaxpr, eqns, invars, outvars) -> jex.core.Jaxpr:
    """The program that does some equations of another."""
    return program.replace(
        constvars=[],
        invars=list(invars),
        outvars=list(outvars),
        eqns=list(eqns),
        effects=frozenset().union(*(eqn.effects for eqn in eqns)),
        debug_info=program.debug_info._replace(
            arg_names=("",) * len(invars), result_paths=("",) * len(outvars)
        ),
    )


def consts_to_args(closed: jex.core.ClosedJaxpr) -> jex.core.Jaxpr:
    """The program with its constants, `closed.consts`, as its first arguments."""
    program = closed.jaxpr
    arguments = [*program.constvars, *program.invars]
    return sub_jaxpr(program, program.eqns, arguments, program.outvars)


def backward_slice(program: jex.core.Jaxpr, outvars, known) -> jex.core.Jaxpr:
    """The part that some variables are computed by, from others that are known.

    Its arguments are those that it needs: known ones, and arguments of the program.
    """
    known = set(variables(known))
    missing, eqns = set(variables(outvars)) - known, []
    for eqn in reversed(program.eqns):
        if missing.intersection(eqn.outvars):
            missing.update(v for v in variables(eqn.invars) if v not in known)
            eqns.insert(0, eqn)
    made = {v for eqn in eqns for v in eqn.outvars}
    used = variables([*(v for eqn in eqns for v in eqn.invars), *outvars])
    return sub_jaxpr(program, eqns, [v for v in used if v not in made], outvars)


def evaluate(program: jex.core.Jaxpr, *args) -> list[Array]:
    """What the program returns."""
    outs = jex.core.jaxpr_as_fun(jex.core.ClosedJaxpr(program, []))(*args)
    # A number that was written into the program is returned as such.
    return [out if isinstance(out, jax.Array) else jnp.asarray(out) for out in outs]


def evaluate_inlined(
    program: jex.core.Jaxpr, *args, calls: frozenset[str]
) -> list[Array]:
    """The same, with the calls of these names replaced by the bodies of the called.

    Within loops and branches too, unless all that is called there are jitted functions.
    """
    values = dict(zip(program.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jex.core.Literal) else values[atom]

    for eqn in program.eqns:
        if eqn.primitive.name in calls:
            inner = called_jaxpr(eqn)
            operands = [*inner.consts, *map(read, eqn.invars)]
            outs = evaluate_inlined(consts_to_args(inner), *operands, calls=calls)
        else:
            needed = variables(eqn.invars)
            if not (calls - JITTED).isdisjoint(primitives_within(eqn)):
                eqn = _with_inner_inlined(eqn, calls)
            alone = sub_jaxpr(program, [eqn], needed, eqn.outvars)
            outs = evaluate(alone, *(values[v] for v in needed))
        values |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in program.outvars]


def _with_inner_inlined(eqn, calls: frozenset[str]):
    """An equation whose inner programs do not call these."""

    def rewrite(value):
        if type(value) in (tuple, list):
            return type(value)(map(rewrite, value))
        return (
            _inline(value, calls) if isinstance(value, jex.core.ClosedJaxpr) else value
        )

    return eqn.replace(params={k: rewrite(v) for k, v in eqn.params.items()})


def _inline(closed: jex.core.ClosedJaxpr, calls: frozenset[str]):
    """The program with these calls inlined, and what they hold made its own."""

    def run(*args):
        return evaluate_inlined(
            consts_to_args(closed), *closed.consts, *args, calls=calls
        )

    return jax.make_jaxpr(run)(*closed.in_avals)


def jit_has_consts(program: jex.core.Jaxpr) -> bool:
    """Whether a jitted function in it closes over arrays that JAX knows."""
    calls = [e.params["jaxpr"] for e in program.eqns if e.primitive.name in JITTED]
    return any(call.consts or jit_has_consts(call.jaxpr) for call in calls)


def inline_jit(closed: jex.core.ClosedJaxpr) -> jex.core.ClosedJaxpr:
    """The program with jitted functions inlined, and what they hold made its own."""
    return _inline(closed, JITTED)
