"""A decoding step in few kernels: norm, product, activation and residual become one.

The step is traced with marks on its ops; then its equations are run one by one, and what is marked
waits until something else needs it. So a product goes to our kernel with the norm before it and
the residual after it, or with the products before it as well, and modules know nothing of that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxllm.core.choices import took
from jaxllm.core.policy import Policy
from jaxllm.errors import UnsupportedError
from jaxllm.ops.marks import MARK, marking
from jaxllm.ops.quantized import codes_obstacle, operands
from pallas_kernels.target import not_hopper, target

__all__ = ["AUTO_ROWS", "fused", "obstacle"]

MOST_ROWS = 8
AUTO, AUTO_ROWS = "chained", 4
"""What `auto` takes for weights in bfloat16, and up to how many tokens it takes our kernels at all:
as measured (docs/benchmarks.md). Packed weights it takes one by one, a kernel a product."""

_ACTIVATIONS = ("silu", "gelu_tanh", "relu")


def obstacle(policy: Policy) -> str | None:
    """Why no step of few tokens runs in fused kernels under a policy, or None."""
    platform = target()
    if platform not in ("gpu", "interpreter"):
        return f"they are for Hopper GPUs, this is {platform}"
    if policy.compute_dtype != "bfloat16":
        return f"they compute in bfloat16, not {policy.compute_dtype}"
    if not jax.sharding.get_abstract_mesh().empty:
        return "they run on one device"
    if policy.matrices != "out_in" or policy.layout != "unrolled":
        return "they take an array a layer, outputs first"
    return not_hopper(platform)


def fused(function: Callable[..., Any], *, policy: Policy, rows: int) -> Callable[..., Any]:
    """The function of trees of arrays, in fused kernels where the policy's `decode` allows it.

    Args:
      function: of a step.
      policy: how it runs.
      rows: tokens of the step; with more than `MOST_ROWS` it is no step of few tokens.

    Raises:
      UnsupportedError: the policy names a way that this device or layout does not have.
    """
    if policy.decode == "plain" or rows > MOST_ROWS:
        return function
    reason = obstacle(policy)
    if reason is None and (policy.decode != "auto" or rows <= AUTO_ROWS):
        name = AUTO if policy.decode == "auto" else policy.decode
        took("decode", name)
        return functools.partial(_run, function, name, policy.decode != "auto")
    if policy.decode != "auto":
        raise UnsupportedError(f"decode {policy.decode!r}: {reason}; use 'auto'")
    took("decode", "plain")
    return function


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """How a step runs.

    Attributes:
      name: `fused` or `chained`; see `Policy.decode`.
      counter: of programs, for all chains of the step; None where there are none.
      packed: whether packed weights are chained too.
    """

    name: str
    counter: Any = None
    packed: bool = True

    def chains(self, w: Any) -> bool:
        """Whether a product with these weights may follow another in one kernel."""
        from pallas_kernels.decode_matmul import Packed

        return self.name == "chained" and (self.packed or not isinstance(w, Packed))


def _run(function: Callable[..., Any], name: str, packed: bool, *args: Any) -> Any:
    flat, tree = jax.tree.flatten(args)
    counter = jax.new_ref(jnp.zeros(1, jnp.int32)) if name == "chained" else None
    way = Way(name, counter, packed)
    trees: list[Any] = []

    def inner(*leaves: Any) -> Any:
        out, structure = jax.tree.flatten(function(*tree.unflatten(leaves)))
        trees.append(structure)
        return out

    with marking():
        closed = jax.make_jaxpr(inner)(*flat)
    return trees[-1].unflatten(list(map(_value, _evaluate(closed, flat, way))))


@dataclasses.dataclass(eq=False)
class Waiting:
    """An array that is not computed yet.

    Attributes:
      shape: of the array.
      kind: what it is: `norm`, `product`, `half`, `hidden` or `sum`.
      args: what that is made of.
      make: computes it in some shape.
      root: what this is a view of in another shape, or None.
      made: the array, when it is computed.
    """

    shape: tuple[int, ...]
    kind: str
    args: Any
    make: Callable[[], Any]
    root: Waiting | None = None
    made: Any = None

    @property
    def origin(self) -> Waiting:
        """This, or what it is a view of."""
        return self if self.root is None else self.root

    @property
    def known(self) -> bool:
        """Whether it is computed."""
        return self.origin.made is not None

    def value(self) -> Any:
        """The array, computed once for all views."""
        origin = self.origin
        if origin.made is None:
            origin.made = origin.make()
        return origin.made.reshape(self.shape)

    def view(self, shape: tuple[int, ...]) -> Waiting:
        """The same in another shape."""
        return dataclasses.replace(self, shape=shape, root=self.origin)


@dataclasses.dataclass(eq=False)
class Product:
    """What a product is made of.

    Attributes:
      x: [R, I]; waiting or not.
      w: [O, I], plain or packed.
      out_dtype: of the result.
      plain: computes it without our kernel.
      gate: activation of the first half of the outputs, which multiplies the second, or None.
      residual: what is added, of any shape; waiting or not.
      way: how the step runs.
    """

    x: Any
    w: Any
    out_dtype: Any
    plain: Callable[[], Any]
    way: Way
    gate: str | None = None
    residual: Any = None

    @property
    def norm(self) -> Waiting | None:
        """The norm of `x` that the kernel makes."""
        x = self.x
        return x if isinstance(x, Waiting) and x.kind == "norm" and not x.known else None

    @property
    def source(self) -> Any:
        """What is multiplied, before the norm; of any shape."""
        return self.x if self.norm is None else self.norm.args[0]


def _value(x: Any) -> Any:
    return x.value() if isinstance(x, Waiting) else x


def _evaluate(closed: Any, flat: list[Any], way: Way) -> list[Any]:
    """The results of a trace, its marked equations as late as they can be."""
    jaxpr, known = closed.jaxpr, {}

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else known[variable]

    known.update(zip(jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(jaxpr.invars, flat, strict=True))
    for equation in jaxpr.eqns:
        given = [read(v) for v in equation.invars]
        inner = equation.params.get("jaxpr") if equation.primitive.name == "jit" else None
        if inner is not None and any(e.primitive is MARK for e in inner.eqns):
            found = _evaluate(inner, given, way)  # a layer that is traced once for all alike
        else:
            found = _later(equation, given, way)
        if found is None:
            params = equation.primitive.get_bind_params(equation.params)
            with equation.ctx.manager:
                found = equation.primitive.bind(*map(_value, given), **params)
            found = found if equation.primitive.multiple_results else [found]
        known.update(zip(equation.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _later(equation: Any, given: list[Any], way: Way) -> list[Any] | None:
    """What an equation gives, to be computed later, or None if it is computed now."""
    name, params = equation.primitive.name, equation.params
    if equation.primitive is MARK:
        function, static = params["function"], dict(params["static"])
        return [_marked(params["kind"], function, static, given, way)]
    if not any(isinstance(x, Waiting) and not x.known for x in given):
        return None
    first = given[0]
    if name == "name":
        return [first]
    if name == "reshape" and params["dimensions"] is None:
        return [first.view(tuple(params["new_sizes"]))]
    if name == "split" and first.kind == "product":
        return _halves(first, params["sizes"], params["axis"])
    if name == "add":
        return _sum(*given)
    return None


def _halves(product: Waiting, sizes: Any, axis: int) -> list[Any] | None:
    last = len(product.shape) - 1
    if axis != last or len(sizes) != 2 or sizes[0] != sizes[1]:
        return None
    width = int(sizes[0])
    shape = (*product.shape[:-1], width)

    def half(index: int) -> Any:
        start = index * width
        return jax.lax.slice_in_dim(product.value(), start, start + width, axis=last)

    return [
        Waiting(shape, "half", (product.args, index), functools.partial(half, index))
        for index in (0, 1)
    ]


def _sum(left: Any, right: Any) -> list[Any] | None:
    """A product and what it is added to."""
    for y, other in ((right, left), (left, right)):
        if not isinstance(y, Waiting) or y.kind != "product" or y.known:
            continue
        if isinstance(other, Waiting) and other.kind != "sum":
            other = other.value()
        dtype = other.args.out_dtype if isinstance(other, Waiting) else other.dtype
        if tuple(other.shape) == y.shape and dtype == y.args.out_dtype:
            args = dataclasses.replace(y.args, residual=other, plain=y.value)
            return [_waiting(y.shape, "sum", args)]
    return None


def _waiting(shape: tuple[int, ...], kind: str, args: Product) -> Waiting:
    """A product that waits."""
    found = Waiting(shape, kind, args, lambda: _made(found))
    return found


def _marked(kind: str, function: Any, static: dict[str, Any], given: list[Any], way: Way) -> Any:
    def plain() -> Any:
        return function(*map(_value, given), **static)

    if kind == "norm" and not static.get("offset"):
        return Waiting(tuple(given[0].shape), "norm", (*given, static), plain)
    if kind == "product":
        (x, w), out = given, jnp.dtype(static["out_dtype"])
        args = Product(x, w, out, plain, way=way)
        return _waiting((x.shape[0], w.shape[0]), "product", args)
    if kind == "packed":
        return _packed(static, given, plain, way)
    if kind == "hidden" and _gated(given, static["mlp"]):
        args = dataclasses.replace(
            given[0].args[0], gate=static["mlp"].activation, plain=plain, residual=None
        )
        found = _waiting(given[0].shape, "hidden", args)
        return found if _links([found]) is not None else plain()
    return plain()


def _packed(static: dict[str, Any], given: list[Any], plain: Any, way: Way) -> Any:
    """A product with a quantized matrix, which waits if our kernel takes such codes."""
    from pallas_kernels.decode_matmul import Packed

    x, *arrays = given
    leaf = jax.tree.unflatten(static["leaf"], arrays)
    if len(x.shape) != 2 or codes_obstacle(leaf) is not None:
        return plain()
    values, scale, _ = operands(leaf)
    w, out = Packed(values, scale, leaf.version == 3), jnp.dtype(static["out_dtype"])
    args = Product(x, w, out, plain, way=way)
    return _waiting((x.shape[0], leaf.num_outputs), "product", args)


def _gated(given: list[Any], mlp: Any) -> bool:
    """Whether a hidden is act(gate) * up of the two halves of one product."""
    if len(given) != 2 or not all(isinstance(x, Waiting) and x.kind == "half" for x in given):
        return False
    (up, one), (gate, zero) = given[0].args, given[1].args
    simple = mlp.gate_scale == 1.0 and mlp.clamp is None and mlp.gain == 1 and not mlp.up_offset
    return up is gate and (one, zero) == (1, 0) and simple and mlp.activation in _ACTIVATIONS


def _chain(last: Waiting) -> list[Waiting]:
    """A product with those before it that nothing else has needed so far."""
    chain = [last]
    while chain[0].args.way.chains(last.args.w):
        source = chain[0].args.source
        if not isinstance(source, Waiting) or source.known or source.kind not in ("hidden", "sum"):
            break
        chain.insert(0, source.origin)
    return chain


def _links(chain: list[Waiting]) -> Any:
    """(links, residual, x) of products for our kernel, or None where it cannot serve them."""
    from pallas_kernels.decode_matmul import Link, explain

    links, residual = [], None
    for index, waiting in enumerate(chain):
        args, kept = waiting.args, None
        origins = [other.origin for other in chain[:index]]
        if isinstance(args.residual, Waiting) and args.residual.origin in origins:
            kept = origins.index(args.residual.origin)
        elif args.residual is not None:
            kept = "given"
            if residual is not None and residual is not args.residual:
                return None
            residual = args.residual
        w = args.w if args.gate is None else _halved(args.w)
        norm = {}
        if args.norm is not None:
            _, scale, static = args.norm.args
            norm = {"norm": scale, "eps": static["eps"]}
        links.append(Link(w=w, gate=args.gate, residual=kept, **norm))
        if index < len(chain) - 1 and args.out_dtype != jnp.bfloat16:
            return None
    first = chain[0].args
    rows, inputs = first.x.shape
    waits = isinstance(first.source, Waiting)
    x = jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16 if waits else first.source.dtype)
    outputs = (rows, chain[-1].args.w.shape[0])
    kind = None if residual is None else jax.ShapeDtypeStruct(outputs, jnp.bfloat16)
    if explain(x, tuple(links), residual=kind).name == "reference":
        return None
    return links, residual, first.source


def _halved(w: Any) -> Any:
    """A matrix of two halves, plain or packed, as [2, O, I]."""
    return jax.tree.map(lambda array: array.reshape(2, -1, array.shape[-1]), w)


def _made(last: Waiting) -> Any:
    """A product, [R, O] or in the shape of its residual."""
    from pallas_kernels.decode_matmul import decode_chain

    chain = _chain(last)
    found = _links(chain)
    while found is None and len(chain) > 1:
        chain = chain[1:]
        found = _links(chain)
    args = last.args
    if found is None:
        y = args.plain()
        return y if args.residual is None else y + _value(args.residual)
    links, residual, source = found
    rows, inputs = chain[0].args.x.shape
    x = _value(source).reshape(rows, inputs)
    if residual is not None:
        residual = _value(residual).reshape(rows, -1)
    *before, y = decode_chain(
        x, tuple(links), residual=residual, out_dtype=args.out_dtype, counter=args.way.counter
    )
    for waiting, array in zip(chain, before, strict=False):
        waiting.made = array
    return y
