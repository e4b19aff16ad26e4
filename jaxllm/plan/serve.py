"""Planning generation: prefill of one bucket, decoding, and what is left for sequences."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jaxllm.core.config import require
from jaxllm.core.mesh import AXES, make_mesh, parse_mesh
from jaxllm.core.policy import Policy
from jaxllm.core.precision import default_dtype, dtype_of
from jaxllm.core.quantize import Scheme
from jaxllm.infer import programs
from jaxllm.infer.open import run_policy, run_segments
from jaxllm.infer.programs import Setup, bucket
from jaxllm.infer.ready import COMPILER_OPTIONS
from jaxllm.nn import api
from jaxllm.plan.compiled import Parts, Work, device_bytes, plan_program
from jaxllm.plan.place import Place
from jaxllm.plan.result import Plan, ProgramPlan, Serving
from jaxllm.plan.train import general_notes, nearest_mesh
from jaxllm.quant.apply import quantize_params
from jaxllm.spec.cost import flops, num_params, weight_bytes
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.ops import Attention
from jaxllm.state.paged import check_kv_dtype, page_bytes
from jaxllm.train.mesh import note_whole, tensor_sizes

__all__ = ["ServeOptions", "default_mesh", "padding_waste", "plan_serving"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a model would be served.

    Attributes:
      batch: sequences at once, over all devices.
      prompt: tokens of a prompt; its bucket is compiled.
      context: slots of every sequence.
      dtype: of weights and activations; what suits the platform if None.
      quantize: format of the layers' matrices, as of `jaxllm quantize`; None leaves them as they
        are.
      kv_dtype: of keys and values in the pages of `jaxllm serve`: `int8`, `fp8` or `auto`; only the
        room for tokens is planned by it.
      attention: implementation of softmax attention.
      mesh: devices by axis; None lets `plan_serving` choose.
      steps: tokens that a call of the decoding program makes.
    """

    batch: int = 8
    prompt: int = 1024
    context: int = 4096
    dtype: str | None = None
    quantize: str | None = None
    kv_dtype: str = "auto"
    attention: str = "auto"
    mesh: str | None = None
    steps: int = 8

    def __post_init__(self) -> None:
        check_kv_dtype(self.kv_dtype)
        for name in ("batch", "prompt", "context", "steps"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is at least 1, found {value}")
        require(
            self.prompt <= self.context,
            f"a prompt of {self.prompt} tokens is longer than the context of {self.context}",
        )


def default_mesh(spec: ModelSpec, place: Place, weights: int) -> dict[str, int]:
    """Heads of keys split as far as they go; the rest takes sequences, or weights that are large.

    More devices than key heads on `tensor` would each hold copies of keys and values.
    """
    devices, room = len(place.devices), place.limits
    kv_heads = [op.kv_heads for op in spec.ops if isinstance(op, Attention)]
    fits = (n for n in tensor_sizes(spec) if devices % n == 0)
    tensor = max(n for n in fits if all(heads % n == 0 for heads in kv_heads))
    wide = room is not None and weights / tensor > 0.6 * room.memory_bytes
    return {"fsdp" if wide else "data": devices // tensor, "tensor": tensor}


def _mesh(spec: ModelSpec, place: Place, options: ServeOptions) -> dict[str, int]:
    """Axis sizes: those asked for, or the default of `plan_serving`."""
    devices = len(place.devices)
    fits = tensor_sizes(spec)
    if options.mesh is None:
        dtype = options.dtype or default_dtype(place.platform)
        sizes = default_mesh(spec, place, weight_bytes(spec, dtype_of(dtype).itemsize))
    else:
        sizes = parse_mesh(options.mesh)
    found = math.prod(sizes.values())
    require(
        found == devices,
        f"mesh {options.mesh!r} is of {found} devices, {place.name} has {devices}; "
        f"the nearest is {nearest_mesh(sizes, devices)!r}",
    )
    tensor = sizes.get("tensor", 1)
    near = min(fits, key=lambda n: (abs(n - tensor), n))
    require(
        tensor in fits,
        f"mesh {options.mesh!r}: heads and feed-forward of this model do not divide by "
        f"tensor={tensor}; the nearest that works is tensor={near}",
    )
    rows = math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp", "expert"))
    require(
        options.batch % rows == 0,
        f"{options.batch} sequences are no multiple of the {rows} devices that share them; "
        f"take --batch {-(-options.batch // rows) * rows}",
    )
    return sizes


def serving_setup(spec: ModelSpec, policy: Policy, mesh: Any, quantize: str | None) -> Setup:
    """A model of which nothing is held; `quantize` as of `ServeOptions`."""
    segments = run_segments(spec, policy)

    def make() -> Any:
        layout = {"segments": segments, "fused": policy.fused}
        params = api.init(spec, jax.random.key(0), dtype=dtype_of(policy.param_dtype), **layout)
        params = api.hold(spec, params, policy)
        if quantize is None:
            return params
        return quantize_params(
            spec, params, Scheme(format=quantize), policy=policy, group_given=False
        )

    params = jax.eval_shape(make)
    if mesh is not None:
        shardings = api.param_shardings(spec, params, mesh, policy)
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings
        )
    return Setup(spec=spec, policy=policy, params=params, segments=segments, mesh=mesh)


def padding_waste(context: int) -> tuple[tuple[int, float], ...]:
    """(bucket, mean share of padding) of the prompt buckets up to a context.

    Over all lengths that go into a bucket, each as likely as the others.
    """
    out, low = [], 0
    while low < context:
        size = bucket(low + 1)
        top = min(size, context)
        mean = (low + 1 + top) / 2
        out.append((size, 1.0 - mean / size))
        low = size
    return tuple(out)


def _paged_share(spec: ModelSpec, dtype: str, kv_dtype: str) -> float:
    """What pages of 8 bits and their scales take of the bytes of those in `dtype`."""
    if kv_dtype == "auto":
        return 1.0
    how: dict[str, Any] = {"page_size": 1, "dtype": dtype_of(dtype)}
    coded, plain = (sum(page_bytes(spec, kv_dtype=x, **how).values()) for x in (kv_dtype, "auto"))
    return coded / plain


def _left(
    plans: tuple[ProgramPlan, ...], state: Any, slots: int, context: int, *, share: float
) -> Serving:
    """What is left for tokens beside parameters, code and the largest temporaries.

    Args:
      share: of the state's bytes that pages would take.
    """
    leaves = jax.tree.leaves(state)
    whole = share * sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    limit, held = plans[0].memory.limit, share * sum(device_bytes(x) for x in leaves)
    room = None
    if limit is not None and held:
        taken = max(p.memory.total - p.memory.state for p in plans)
        room = max(0, int((limit - taken) / (held / slots)))
    return Serving(
        kv_bytes_per_token=whole / slots,
        kv_capacity_tokens=room,
        waste=padding_waste(context),
    )


def plan_serving(spec: ModelSpec, place: Place, options: ServeOptions, *, source: str) -> Plan:
    """The plan of prefill and decoding of a model on a place.

    Without a mesh, `tensor` takes as many devices as divide the heads of keys; those left over
    share the sequences (`data`), and the weights as well (`fsdp`) where these are large.

    Raises:
      ConfigError: a mesh that does not match the devices or the model, with the nearest that does.
      UnsupportedError: the model is an encoder.
    """
    programs.check_decodes(spec)
    context = min(options.context, spec.context)
    sizes = _mesh(spec, place, options)
    mesh: Any = None if place.alone else make_mesh(sizes, place.devices)
    dtype = options.dtype or default_dtype(place.platform)
    share = _paged_share(spec, dtype, options.kv_dtype)
    policy = run_policy(dtype, mesh=mesh, platform=place.platform, attention=options.attention)
    if mesh is not None:
        note_whole(spec, sizes.get("tensor", 1))
    compiler = COMPILER_OPTIONS.get(place.devices[0].platform, ())
    setup = dataclasses.replace(
        serving_setup(spec, policy, mesh, options.quantize), options=compiler
    )
    capacity, length = bucket(context, 256), bucket(min(options.prompt, context))
    axes = {axis: sizes.get(axis, 1) for axis in AXES} if mesh is not None else {}
    slots = {"batch": options.batch, "capacity": capacity}
    fresh = programs.prefill(setup, length=length, mode="greedy", fresh=True, **slots)
    later = programs.decode(setup, mode="greedy", tokens=options.steps, **slots)
    state = setup.state(**slots)

    def plan(name: str, program: Any, tokens: int, needed: float, held: Any) -> ProgramPlan:
        whole = (options.batch * tokens, options.batch * needed)
        work = Work(name=name, tokens=whole[0], flops=whole[1], dtype=dtype)
        parts = Parts(parameters=setup.params, state=held)
        return plan_program(program, place, work, parts=parts, mesh=axes)

    one_token = flops(spec, 1, past=capacity - 1)["total"]
    plans = (
        plan("prefill", fresh, length, flops(spec, length, logits=1)["total"], ()),
        plan("decode", later, options.steps, options.steps * one_token, state),
    )
    return Plan(
        source=source,
        purpose="serve",
        place=place.name,
        kind=place.kind,
        devices=len(place.devices),
        mesh={axis: size for axis, size in sizes.items() if size > 1},
        settings={
            "batch": options.batch,
            "prompt_bucket": length,
            "context_slots": capacity,
            "decode_steps": options.steps,
            "dtype": dtype,
            **({} if options.quantize is None else {"quantize": options.quantize}),
            **({} if options.kv_dtype == "auto" else {"kv_dtype": options.kv_dtype}),
            "attention": options.attention,
            "layout": policy.layout,
        },
        num_params=num_params(spec),
        programs=plans,
        serving=_left(plans, state, options.batch * capacity, context, share=share),
        notes=tuple(general_notes(place, *plans)),
    )
