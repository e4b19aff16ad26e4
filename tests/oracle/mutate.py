"""Mutations of a spec: one feature changed, the parameters as they were."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxllm.core.policy import Policy
from jaxllm.nn import api
from jaxllm.spec.mask import And, Causal, Window
from jaxllm.spec.ops import Attention
from jaxllm.state.step import training_step

FACTOR = 100
# One array a layer and no jit: XLA compiles each primitive once, and a mutated spec none anew.
POLICY = Policy(layout="unrolled", fused=False)


def logits(spec, params, ids):
    """All logits of a spec, be it the one that the parameters were made for or not."""
    ids = jnp.asarray(ids)
    hidden, _, _ = api.apply(spec, params, ids, training_step(*ids.shape), policy=POLICY)
    return np.asarray(api.unembed(spec, params, hidden, policy=POLICY))


def change(spec, kind, **changes):
    """The spec with fields of every op of a kind replaced; a function gets the old value."""

    def new(op):
        if not isinstance(op, kind):
            return op
        values = {k: v(getattr(op, k)) if callable(v) else v for k, v in changes.items()}
        return dataclasses.replace(op, **values)

    def in_sub(sub):
        ops = tuple(dataclasses.replace(named, op=new(named.op)) for named in sub.ops)
        return dataclasses.replace(sub, ops=ops)

    blocks = tuple(
        dataclasses.replace(b, subs=tuple(in_sub(s) for s in b.subs)) for b in spec.blocks
    )
    return dataclasses.replace(spec, blocks=blocks)


def part(name, **changes):
    """A mutation of the spec's head, embedding or final norm."""
    return lambda s: dataclasses.replace(
        s, **{name: dataclasses.replace(getattr(s, name), **changes)}
    )


def attn(**changes):
    """A mutation of the attention."""
    return lambda s: change(s, Attention, **changes)


def rope(**changes):
    """A mutation of the rotary embedding."""
    return attn(rope=lambda old: dataclasses.replace(old, **changes))


def window(keys):
    """A window of so many keys, the query's own among them."""
    return attn(mask=And(first=Causal(), second=Window(left=keys - 1)))


def only(block, mutate):
    """A mutation of one block alone."""

    def apply(spec):
        changed = {b.name: b for b in mutate(spec).blocks}
        blocks = tuple(changed[b.name] if b.name == block else b for b in spec.blocks)
        return dataclasses.replace(spec, blocks=blocks)

    return apply


def subs(**changes):
    """A mutation of every residual update; a function gets the old value."""

    def in_sub(sub):
        values = {k: v(getattr(sub, k)) if callable(v) else v for k, v in changes.items()}
        return dataclasses.replace(sub, **values)

    def apply(spec):
        blocks = tuple(
            dataclasses.replace(b, subs=tuple(in_sub(s) for s in b.subs)) for b in spec.blocks
        )
        return dataclasses.replace(spec, blocks=blocks)

    return apply


def renorm(**changes):
    """A change of a norm, where there is one."""
    return lambda norm: None if norm is None else dataclasses.replace(norm, **changes)
