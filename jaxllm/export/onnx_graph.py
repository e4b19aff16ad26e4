"""A decoder of the usual shape as one ONNX graph for prefill and decode, in float32 and plain ops.

Inputs `input_ids` [1, T] int64 and `past.I.key`, `past.I.value` [1, K, P, H]; outputs `logits`
[1, V] of the last token and `present.I.key`, `present.I.value` [1, K, P + T, H].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core.config import require
from jaxllm.errors import UnsupportedError
from jaxllm.infer.leaves import host_leaf, plain_leaf
from jaxllm.infer.open import open_merged, run_policy
from jaxllm.ops.rope import frequencies
from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, NamedOp, Sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.spec.rope import Llama3Scaling, Rope

__all__ = ["check_spec", "export_onnx"]

_OPSET = 18


def export_onnx(source: str, dest: str | Path, *, adapter: Path | None = None) -> Path:
    """Write `model.onnx`, its weights beside it, and tokenizer and chat template.

    Args:
      source: what `jaxllm.load` takes.
      dest: a new directory.
      adapter: folder of a LoRA adapter that is merged into the weights.

    Raises:
      ConfigError: `dest` exists; UnsupportedError: onnx is not installed, or the model has what the
        graph has no nodes for.
    """
    try:
        import onnx
    except ImportError:
        raise UnsupportedError("--onnx needs the package onnx: install jaxllm[onnx]") from None
    dest = Path(dest)
    require(not dest.exists(), f"{dest} exists; give a new directory")
    policy = run_policy("float32", fused=False, matrices="canonical", codes="values")
    opened = open_merged(source, adapter, policy=policy, put=lambda array, _: np.asarray(array))
    check_spec(opened.spec)

    def read(path: str) -> np.ndarray:
        return np.asarray(plain_leaf(host_leaf(opened.spec, opened.params, path)), np.float32)

    graph = _Graph(onnx)
    _decoder(graph, opened.spec, read)
    dest.mkdir(parents=True)
    onnx.save_model(
        graph.model(), str(dest / "model.onnx"), save_as_external_data=True, location="model.data"
    )
    if opened.tokenizer is not None:
        opened.tokenizer.save(dest)
    return dest


def check_spec(spec: ModelSpec) -> None:
    """Refuse a model with parts that the graph lacks.

    Raises:
      UnsupportedError: it names them.
    """
    wrong = [f"block {block.name}: {reason}" for block in spec.blocks if (reason := _odd(block))]
    if spec.embedding != Embedding(scale=spec.embedding.scale):
        wrong.append("embedding: more than rows of tokens")
    if spec.head not in (Head(tied=True), Head(tied=False)):
        wrong.append("head: more than a matrix")
    if not _plain_norm(spec.final_norm):
        wrong.append("final norm: no RMS norm")
    if wrong:
        raise UnsupportedError(f"no ONNX graph for this model: {'; '.join(wrong)}")


def _plain_norm(norm: Norm | None) -> bool:
    return norm is not None and norm == Norm(eps=norm.eps, offset=norm.offset)


def _odd(block: Block) -> str | None:
    """What a block has beside attention and then a gated MLP, both after an RMS norm; or None."""
    if len(block.subs) != 2:
        return "not attention and then an MLP"
    for sub in block.subs:
        named = sub.ops[0]
        if sub != Sub(ops=(NamedOp(name=named.name, op=named.op),), norm_in=sub.norm_in):
            return f"{named.name}: more than x + f(norm(x))"
        if not _plain_norm(sub.norm_in):
            return f"{named.name}: no RMS norm before it"
    attn, mlp = (sub.ops[0].op for sub in block.subs)
    if not isinstance(attn, Attention) or not isinstance(mlp, MLP):
        return "not attention and then an MLP"
    plain = Attention(
        heads=attn.heads,
        kv_heads=attn.kv_heads,
        head_dim=attn.head_dim,
        qkv_bias=attn.qkv_bias,
        out_bias=attn.out_bias,
        scale=attn.scale,
        rope=attn.rope,
    )
    if attn != plain:
        return "attention with more than heads, biases and a causal mask"
    rope = attn.rope
    if rope is None or rope != Rope(theta=rope.theta, scaling=rope.scaling):
        return "no rope over whole heads in halves"
    if rope.scaling is not None and not isinstance(rope.scaling, Llama3Scaling):
        return f"rope scaling {rope.scaling.kind}"
    return None if mlp == MLP(width=mlp.width) else "an MLP other than down(silu(gate) * up)"


class _Graph:
    """Nodes, weights, inputs and outputs as they come up; values go by name."""

    def __init__(self, onnx: Any):
        self.onnx, self.nodes, self.weights = onnx, [], []
        self.inputs, self.outputs, self.count = [], [], 0

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """One node; the name of its value, or a list of names."""
        names = [f"v{self.count + i}" for i in range(outputs)]
        self.count += outputs
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def const(self, array: Any, name: str | None = None) -> str:
        """A weight or a constant."""
        name = name or f"c{len(self.weights)}"
        array = np.asarray(array, order="C")
        self.weights.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        """A list of integers."""
        return self.const(np.array(values, np.int64))

    def value(self, name: str, shape: tuple[int | str, ...], *, kind: str = "FLOAT") -> Any:
        """A description of an input or output."""
        dtype = getattr(self.onnx.TensorProto, kind)
        return self.onnx.helper.make_tensor_value_info(name, dtype, list(shape))

    def output(self, value: str, name: str, shape: tuple[int | str, ...]) -> None:
        """Let a value out under a name."""
        self.nodes.append(self.onnx.helper.make_node("Identity", [value], [name]))
        self.outputs.append(self.value(name, shape))

    def model(self) -> Any:
        """The whole, checked by onnx."""
        helper = self.onnx.helper
        graph = helper.make_graph(
            self.nodes, "decoder", self.inputs, self.outputs, initializer=self.weights
        )
        opset = [helper.make_opsetid("", _OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=10, producer_name="jaxllm")


def _decoder(g: _Graph, spec: ModelSpec, read: Callable[[str], np.ndarray]) -> None:
    """All nodes of a model that `check_spec` lets pass."""
    g.inputs.append(g.value("input_ids", (1, "T"), kind="INT64"))
    table = g.const(read("embed.table"), "embed.table")
    x = g.op("Gather", table, "input_ids")
    if spec.embedding.scale != 1:
        x = g.op("Mul", x, g.const(np.float32(spec.embedding.scale)))
    new = g.op("Shape", "input_ids", start=1, end=2)
    places = _places(g, g.op("Shape", "past.0.key", start=2, end=3), new)
    for layer in range(spec.num_layers):
        block = spec.block(layer)
        for part, function in zip(block.subs, (_attention, _mlp), strict=True):
            name, op = part.ops[0].name, part.ops[0].op
            at = f"layers.{layer}.{name}"
            assert part.norm_in is not None
            y = _norm(g, x, read(f"layers.{layer}.{name}_norm.scale"), part.norm_in)
            update = function(g, y, op, lambda n, at=at: read(f"{at}.{n}"), places, layer)
            x = g.op("Add", x, update)
    last = g.op("Gather", x, g.const(np.int64(-1)), axis=1)
    assert spec.final_norm is not None
    last = _norm(g, last, read("final_norm.scale"), spec.final_norm)
    if spec.head.tied:
        out = g.op("Gemm", last, table, transB=1)
    else:
        out = g.op("MatMul", last, g.const(read("head.kernel"), "head.kernel"))
    g.output(out, "logits", (1, spec.vocab))


def _places(g: _Graph, past: str, new: str) -> dict[str, str]:
    """Positions of the new tokens, and where they see: 0 or -inf, [T, P + T]."""
    zero, one = g.const(np.int64(0)), g.const(np.int64(1))
    scalar = g.ints()
    start, count = g.op("Reshape", past, scalar), g.op("Reshape", new, scalar)
    end = g.op("Add", start, count)
    queries = g.op("Range", start, end, one)
    keys = g.op("Range", zero, end, one)
    row, column = g.op("Unsqueeze", keys, g.ints(0)), g.op("Unsqueeze", queries, g.ints(1))
    hidden = g.op("Greater", row, column)
    never, fine = g.const(np.float32(-np.inf)), g.const(np.float32(0))
    return {"queries": queries, "mask": g.op("Where", hidden, never, fine)}


def _norm(g: _Graph, x: str, scale: np.ndarray, norm: Norm) -> str:
    mean = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.const(np.float32(norm.eps))))
    return g.op("Mul", g.op("Div", x, root), g.const(scale + np.float32(norm.offset)))


def _mlp(g: _Graph, x: str, op: Any, read: Any, places: dict[str, str], layer: int) -> str:
    del op, places, layer
    gate, up = (g.op("MatMul", x, g.const(read(name))) for name in ("gate", "up"))
    silu = g.op("Mul", gate, g.op("Sigmoid", gate))
    return g.op("MatMul", g.op("Mul", silu, up), g.const(read("down")))


def _rotated(g: _Graph, x: str, angles: tuple[str, str]) -> str:
    """Halves (a, b) of [1, N, T, H] as (a cos - b sin, b cos + a sin)."""
    cos, sin = angles
    a, b = g.op("Split", x, outputs=2, axis=-1, num_outputs=2)
    first = g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin))
    second = g.op("Add", g.op("Mul", b, cos), g.op("Mul", a, sin))
    return g.op("Concat", first, second, axis=-1)


def _attention(g: _Graph, x: str, op: Any, read: Any, places: dict[str, str], layer: int) -> str:
    def project(name: str, heads: int) -> str:
        """[1, heads, T, H]."""
        kernel = read(name)
        y = g.op("MatMul", x, g.const(kernel.reshape(kernel.shape[0], -1)))
        if op.qkv_bias:
            y = g.op("Add", y, g.const(read(f"{name}_bias").reshape(-1)))
        y = g.op("Reshape", y, g.ints(1, -1, heads, op.head_dim))
        return g.op("Transpose", y, perm=[0, 2, 1, 3])

    freqs = g.const(frequencies(op.rope, op.head_dim)[None])
    places_of = g.op("Cast", g.op("Unsqueeze", places["queries"], g.ints(1)), to=1)
    turned = g.op("Mul", places_of, freqs)
    angles = g.op("Cos", turned), g.op("Sin", turned)
    held = {
        "key": _rotated(g, project("k", op.kv_heads), angles),
        "value": project("v", op.kv_heads),
    }
    for name, new in held.items():
        g.inputs.append(g.value(f"past.{layer}.{name}", (1, op.kv_heads, "P", op.head_dim)))
        held[name] = g.op("Concat", f"past.{layer}.{name}", new, axis=2)
        g.output(held[name], f"present.{layer}.{name}", (1, op.kv_heads, "S", op.head_dim))
    q = _rotated(g, project("q", op.heads), angles)
    groups = op.heads // op.kv_heads
    q = g.op("Reshape", q, g.ints(1, op.kv_heads, groups, -1, op.head_dim))
    keys = g.op("Unsqueeze", g.op("Transpose", held["key"], perm=[0, 1, 3, 2]), g.ints(2))
    scores = g.op("Mul", g.op("MatMul", q, keys), g.const(np.float32(op.query_scale)))
    weights = g.op("Softmax", g.op("Add", scores, places["mask"]), axis=-1)
    y = g.op("MatMul", weights, g.op("Unsqueeze", held["value"], g.ints(2)))
    y = g.op("Reshape", y, g.ints(1, op.heads, -1, op.head_dim))
    y = g.op("Transpose", y, perm=[0, 2, 1, 3])
    y = g.op("Reshape", y, g.ints(1, -1, op.heads * op.head_dim))
    kernel = read("o")
    y = g.op("MatMul", y, g.const(kernel.reshape(-1, kernel.shape[-1])))
    return g.op("Add", y, g.const(read("o_bias"))) if op.out_bias else y
