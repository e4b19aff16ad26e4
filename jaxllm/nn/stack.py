"""The stack of layers: runs each segment as a scan or one by one, as its parameters are held."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxllm.core.config import require
from jaxllm.core.policy import Policy
from jaxllm.core.tree import Segment, layer_tree, take_repeat
from jaxllm.errors import ConfigError, WeightsError
from jaxllm.nn.aux import Aux
from jaxllm.nn.block import Block
from jaxllm.nn.remat import remat
from jaxllm.spec.model import ModelSpec
from jaxllm.state.step import Step
from jaxllm.typing import Slot

__all__ = ["Carry", "Stack", "run"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What passes from layer to layer: hidden states [B, T, D], the step, by-products so far.

    `shared` is `params["shared"]`, leaves that several layers read; `embedded` the embedding
    [B, T, D] where a layer reads it, and else None.
    """

    hidden: Slot
    step: Step
    aux: Aux = dataclasses.field(default_factory=Aux)
    shared: Any = None
    embedded: Slot | None = None


def _copy(aux: Aux) -> Aux:
    return Aux(dict(aux.losses), dict(aux.stats), dict(aux.taps))


def _local_taps(policy: Policy, layer: int) -> frozenset[str]:
    """Taps of one layer by local name: `gram:layers.3.mlp.down` -> `gram:mlp.down` for layer 3."""
    out = set()
    for tap in policy.taps:
        kind, path = ("gram:", tap[5:]) if tap.startswith("gram:") else ("", tap)
        if path.startswith(f"layers.{layer}."):
            out.add(kind + path.removeprefix(f"layers.{layer}."))
    return frozenset(out)


def _global_name(local: str, layer: int) -> str:
    kind, name = ("gram:", local[5:]) if local.startswith("gram:") else ("", local)
    return f"{kind}layers.{layer}.{name}"


class _Unit(nn.Module):
    """The layers of one repeat of a segment; the body of a scan when stacked."""

    spec: ModelSpec
    policy: Policy
    segment: Segment

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], inputs: Any, given: tuple[Step, Slot | None]
    ) -> tuple[Float[Array, "B T D"], Any]:
        (repeat, state), step = inputs, given[0]
        block = remat(Block, self.policy.remat, scanned=self.segment.stacked)
        states, found = {}, {}
        for place in range(self.segment.unit):
            layer = self.segment.start + place
            every = range(layer, self.segment.stop, self.segment.unit)
            wanted = frozenset[str]().union(*(_local_taps(self.policy, i) for i in every))
            key = step.key
            if key is not None:
                key = jax.random.fold_in(key, layer + repeat * self.segment.unit)
            held = state
            if state is not None and self.segment.unit > 1:
                held = state[str(place)]
            module = block(self.spec.block(layer), self.policy, wanted, name=str(place))
            x, (states[str(place)], found[str(place)]) = module(x, given, held, key)
        return x, (None if state is None else states, found)


class Stack(nn.Module):
    """All segments in order."""

    spec: ModelSpec
    policy: Policy
    segments: tuple[Segment, ...]

    @nn.compact
    def __call__(self, carry: Carry, state: Any) -> tuple[Carry, Any]:
        """Run the layers: (carry, state) -> (carry, new state)."""
        x, aux, new_state = carry.hidden, _copy(carry.aux), {}
        for segment in self.segments:
            held = None if state is None else state[segment.key]
            body, repeats = _Unit, jnp.uint32(0)
            if segment.stacked:
                repeats = jnp.arange(segment.repeats, dtype=jnp.uint32)
                body = nn.scan(
                    _Unit,
                    variable_axes={"params": 0},
                    variable_broadcast="shared",
                    split_rngs={"params": False},
                    in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                    length=segment.repeats,
                )
            unit = body(self.spec, self.policy, segment, name=segment.key)
            x, (held, found) = unit(x, (repeats, held), (carry.step, carry.embedded))
            new_state[segment.key] = held
            _collect(self.policy, segment, found, aux)
        carry = dataclasses.replace(carry, hidden=x, aux=aux)
        return carry, None if state is None else new_state


def _collect(policy: Policy, segment: Segment, found: dict[str, Aux], aux: Aux) -> None:
    """Give what layers left their names; a scan brought that of all repeats."""
    for place in range(segment.unit):
        left = found[str(place)]
        for name, loss in left.losses.items():
            aux.losses[name] = aux.losses.get(name, jnp.float32(0)) + jnp.sum(loss)
        for repeat in range(segment.repeats):
            layer = segment.start + repeat * segment.unit + place
            own = lambda value, i=repeat: value[i] if segment.stacked else value  # noqa: E731
            wanted = _local_taps(policy, layer)
            for local, value in left.taps.items():
                if local in wanted:
                    aux.taps[_global_name(local, layer)] = own(value)
            for local, value in left.stats.items():
                aux.stats[f"layers.{layer}.{local}"] = own(value)


def _alike(
    spec: ModelSpec, policy: Policy, variables: Any, carry: Carry, state: Any
) -> tuple[Carry, Any]:
    """Unrolled layers of a flat step: each kind of block is traced and lowered once.

    An engine has dozens of programs: Python's part of each follows the kinds of blocks so, not the
    number of layers. XLA puts the calls back in line.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def one(block: Any, own: Any, x: Any, given: Any, held: Any) -> Any:
        return Block(block, policy, frozenset()).apply(own, x, given, held, None)

    x, aux, new_state = carry.hidden, _copy(carry.aux), {}
    for segment in sorted(Segment.parse(key) for key in state):
        own = {kind: tree.get(segment.key, {}).get("0", {}) for kind, tree in variables.items()}
        given, held = (carry.step, carry.embedded), state[segment.key]
        x, (held, left) = one(spec.block(segment.start), own, x, given, held)
        new_state[segment.key] = held
        _collect(policy, segment, {"0": left}, aux)
    return dataclasses.replace(carry, hidden=x, aux=aux), new_state


def _nest(segment: Segment, tree: Any) -> Any:
    """Linen's names of a segment's parameters: units of one layer stand under "0" too."""
    return tree if segment.unit > 1 else {"0": tree}


def _shared(spec: ModelSpec, segments: tuple[Segment, ...], shared: Any) -> Any:
    """Leaves that several layers read, under the path of every op that reads them."""
    out: dict[str, Any] = {}
    for segment in segments:
        for place in range(segment.unit):
            unit: dict[str, Any] = {}
            for sub in spec.block(segment.start + place).subs:
                names = (*(named.name for named in sub.ops), *sub.norms)
                held = shared.get(sub.share, {})
                unit |= {name: held[name] for name in names if name in held}
                for named in sub.ops:
                    if (leaves := shared.get(getattr(named.op, "share", None))) is not None:
                        unit[named.name] = leaves
            if unit:
                out.setdefault(segment.key, {})[str(place)] = unit
    return out


def _check_blocks(spec: ModelSpec, segment: Segment) -> None:
    """A stack runs every repeat as the block of its first: the others must use the same."""
    for layer in range(segment.start + segment.unit, segment.stop):
        if spec.block(layer) != spec.block(layer - segment.unit):
            raise WeightsError(
                f"layers {segment.key} are stacked, but the spec gives layers "
                f"{layer - segment.unit} and {layer} different blocks; restack by the spec"
            )


def _cut(tree: Any, start: int, stop: int) -> Any:
    """The segments (parameters or state) of layers start..stop-1; a cut stack is sliced.

    Raises:
      WeightsError: not every layer is there once.
    """
    out: dict[str, Any] = {}
    held: list[int] = []
    for segment in sorted(Segment.parse(key) for key in tree):
        first, last = max(segment.start, start), min(segment.stop, stop)
        if first >= last:
            continue
        held += range(first, last)
        if (first, last) == (segment.start, segment.stop):
            out[segment.key] = tree[segment.key]
            continue
        for layer in range(first, last):
            out[str(layer)] = layer_tree(segment, tree[segment.key], layer, take_repeat)
    if held != list(range(start, stop)):
        raise WeightsError(f"layers {start}:{stop} are not all there once: {', '.join(tree)}")
    return out


def run(
    spec: ModelSpec,
    layers: Any,
    carry: Carry,
    state: Any,
    *,
    policy: Policy,
    span: tuple[int, int] | None = None,
) -> tuple[Carry, Any]:
    """Run layers start..stop-1: the seam for pipeline stages and for changes between layers.

    Args:
      spec: the model.
      layers: `params["layers"]` in any segmentation; those outside of the span are not needed.
      carry: hidden states and the step.
      state: state of these layers, stacked like them, or None.
      policy: how to run.
      span: (start, stop); all layers by default.

    Returns:
      (carry, new state of the layers that ran).

    Raises:
      ConfigError: the span is none of the model's.
      WeightsError: layers are missing, or stacked otherwise than the spec or the state allow.
    """
    start, stop = span or (0, spec.num_layers)
    if not 0 <= start < stop <= spec.num_layers:
        raise ConfigError(f"layers {start}:{stop} are not among the model's 0:{spec.num_layers}")
    if spec.reads_embedding and carry.embedded is None:
        require(not start, "layers read the embedding: give it as Carry.embedded after a cut")
        carry = dataclasses.replace(carry, embedded=carry.hidden)
    given, layers = layers, _cut(layers, start, stop)
    if span is None and set(layers) != set(given):
        raise WeightsError(f"the spec has {stop} layers; the parameters: {', '.join(given)}")
    state = None if state is None else _cut(state, start, stop)
    if state is not None and set(state) != set(layers):
        raise WeightsError(
            f"the state is stacked as {', '.join(state)}, the layers as {', '.join(layers)}"
        )
    found = tuple(sorted(Segment.parse(key) for key in layers))
    for segment in found:
        _check_blocks(spec, segment)
    params = {s.key: _nest(s, layers[s.key]) for s in found}
    stack = Stack(spec, policy, found)
    variables = {"params": params, "shared": _shared(spec, found, carry.shared or {})}
    step, single = carry.step, not any(s.stacked or s.unit > 1 for s in found)
    if single and state is not None and step.flat is not None and not policy.taps:
        return _alike(spec, policy, variables, carry, state)
    carry, new_state = stack.apply(variables, carry, state)
    if new_state is not None:
        new_state = {
            s.key: new_state[s.key] if s.unit > 1 else new_state[s.key]["0"] for s in found
        }
    return carry, new_state
