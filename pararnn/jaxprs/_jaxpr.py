"""Jaxprs, the programs of JAX, as data: inspect them, slice them and evaluate them.

Programs here have no constants: the values that a function closes over are its first
arguments. (In JAX up to 0.10, a jaxpr keeps constants apart from the arguments, without
their values. From 0.11 on it holds the values too, which must not be tracers.)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

# The primitives of a jitted function called inside another.
JITTED = frozenset(("jit", "pjit"))


def inner_jaxprs(params: dict[str, Any]) -> Iterator[jex.core.Jaxpr]:
    """Yield the programs in an equation: bodies of loops, branches, functions."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.core.Jaxpr):
                yield item


def is_index(constant: Any) -> bool:
    """Return whether a constant holds known whole numbers, like index tables and masks.

    The search for a structure reads their values, and only the shapes of others.
    """
    kind = getattr(getattr(constant, "dtype", None), "kind", "")
    return kind in tuple("biu") and not isinstance(constant, Tracer)


def called_jaxpr(eqn) -> Any:
    """Return the program of a called function, with its constants if it has any."""
    return eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]


def primitives_of(program: jex.core.Jaxpr) -> set[str]:
    """Return the names of all primitives in a program, including inner programs."""
    found = set()
    for eqn in program.eqns:
        found.add(eqn.primitive.name)
        found |= primitives_within(eqn)
    return found


def primitives_within(eqn) -> set[str]:
    """Return the names of all primitives in the inner programs of an equation."""
    return set().union(*map(primitives_of, inner_jaxprs(eqn.params)))


def variables(atoms: Sequence) -> list[jex.core.Var]:
    """Return those that are not literals, each once."""
    return list(dict.fromkeys(v for v in atoms if isinstance(v, jex.core.Var)))


def dependents_of(program: jex.core.Jaxpr, start) -> set[jex.core.Var]:
    """Return all variables that depend on some, including these."""
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
    """Return the program that consists of some equations of another."""
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
    """Return the program with its constants, `closed.consts`, as first arguments."""
    program = closed.jaxpr
    arguments = [*program.constvars, *program.invars]
    return sub_jaxpr(program, program.eqns, arguments, program.outvars)


def backward_slice(program: jex.core.Jaxpr, outvars, known) -> jex.core.Jaxpr:
    """Return the part of a program that computes some variables from known ones.

    Its arguments are only those that it needs: known ones, and the program's own.
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
    """Return the results of the program."""
    outs = jex.core.jaxpr_as_fun(jex.core.ClosedJaxpr(program, []))(*args)
    # A literal is returned as a plain number.
    return [out if isinstance(out, jax.Array) else jnp.asarray(out) for out in outs]


def read(atom, values: dict) -> Any:
    """Return the value of a variable or literal."""
    return atom.val if isinstance(atom, jex.core.Literal) else values[atom]


def evaluate_equation(program: jex.core.Jaxpr, eqn, values: dict) -> dict:
    """Return the results of one equation of a program, by variable."""
    needed = variables(eqn.invars)
    alone = sub_jaxpr(program, [eqn], needed, eqn.outvars)
    outs = evaluate(alone, *(values[v] for v in needed))
    return dict(zip(eqn.outvars, outs, strict=True))


def evaluate_inlined(
    program: jex.core.Jaxpr, *args, calls: frozenset[str]
) -> list[Array]:
    """Evaluate a program, inlining the calls with these primitives' names.

    Calls in loops and branches are inlined too, unless all are of jitted functions.
    """
    values = dict(zip(program.invars, args, strict=True))
    for eqn in program.eqns:
        if eqn.primitive.name in calls:
            inner = called_jaxpr(eqn)
            operands = [*inner.consts, *(read(v, values) for v in eqn.invars)]
            outs = evaluate_inlined(consts_to_args(inner), *operands, calls=calls)
            values |= dict(zip(eqn.outvars, outs, strict=True))
        else:
            if not (calls - JITTED).isdisjoint(primitives_within(eqn)):
                eqn = _with_inner_inlined(eqn, calls)
            values |= evaluate_equation(program, eqn, values)
    return [read(v, values) for v in program.outvars]


def _with_inner_inlined(eqn, calls: frozenset[str]):
    """Return an equation with these calls inlined in its inner programs."""

    def rewrite(value):
        if type(value) in (tuple, list):
            return type(value)(map(rewrite, value))
        return (
            _inline(value, calls) if isinstance(value, jex.core.ClosedJaxpr) else value
        )

    return eqn.replace(params={k: rewrite(v) for k, v in eqn.params.items()})


def _inline(closed: jex.core.ClosedJaxpr, calls: frozenset[str]):
    """Return the program with these calls inlined, and their constants as its own."""

    def run(*args):
        return evaluate_inlined(
            consts_to_args(closed), *closed.consts, *args, calls=calls
        )

    return jax.make_jaxpr(run)(*closed.in_avals)


def jit_has_consts(program: jex.core.Jaxpr) -> bool:
    """Return whether a jitted function in a program closes over concrete arrays."""
    calls = [e.params["jaxpr"] for e in program.eqns if e.primitive.name in JITTED]
    return any(call.consts or jit_has_consts(call.jaxpr) for call in calls)


def inline_jit(closed: jex.core.ClosedJaxpr) -> jex.core.ClosedJaxpr:
    """Return the program with jitted functions inlined, with their constants."""
    return _inline(closed, JITTED)
