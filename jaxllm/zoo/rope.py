"""Rotary embeddings in config.json: both dialects, every scaling, one rope or one a layer type.

Older files have `rope_theta`, `rope_scaling` (with `type` or `rope_type`) and, for local layers, a
base of their own such as `rope_local_base_freq`; files of transformers 5 have `rope_parameters`,
one object or one a layer type. What a key means, and what an absent one is, follows transformers
5.24 (`modeling_rope_utils`). `ntk`, a fixed larger base, is no type of transformers: it is read and
written here with the formula of arXiv 2309.00071.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxllm.core.config import nearest, to_dict
from jaxllm.errors import ConfigError
from jaxllm.spec.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)
from jaxllm.zoo.table import ConfigReader

__all__ = ["read_rope", "read_ropes", "usable_context", "write_rope", "write_ropes"]

_ORIGINAL = "original_max_position_embeddings"
_FRACTION = "partial_rotary_factor"
Layout = Literal["half", "interleaved"]


@dataclasses.dataclass(frozen=True)
class _Defaults:
    """What an object of rope parameters means where it says nothing.

    Attributes:
      context: the file's max_position_embeddings.
      original: the file's own original_max_position_embeddings, which goes before the object's.
      theta: base, or None where the layer type says.
      fraction: rotated part of a head; None where the family always rotates whole heads.
      layout: which dims make a pair.
    """

    context: int
    original: int | None
    theta: float | None
    fraction: float | None
    layout: Layout


def _original(reader: ConfigReader, defaults: _Defaults) -> int:
    inner = reader.take(_ORIGINAL, int, defaults.context)
    return inner if defaults.original is None else defaults.original


def _plain(_reader: ConfigReader, _: _Defaults) -> Callable[[], None]:
    return lambda: None


def _linear(reader: ConfigReader, _: _Defaults) -> Callable[[], RopeScaling]:
    factor = reader.take("factor", float)
    return lambda: LinearScaling(factor=factor)


def _ntk(reader: ConfigReader, _: _Defaults) -> Callable[[], RopeScaling]:
    factor = reader.take("factor", float)
    return lambda: NtkScaling(factor=factor)


def _dynamic(reader: ConfigReader, defaults: _Defaults) -> Callable[[], RopeScaling]:
    """The original context is max_position_embeddings: the reference reads no other key."""
    factor = reader.take("factor", float)
    if reader.take(_ORIGINAL, int, defaults.context) != defaults.context:
        reader.problem(
            f"{_ORIGINAL} differs from max_position_embeddings, from which dynamic scaling counts"
        )
    return lambda: DynamicScaling(factor=factor, original_context=defaults.context)


def _yarn(reader: ConfigReader, defaults: _Defaults) -> Callable[[], RopeScaling]:
    original = _original(reader, defaults)
    if reader.has("factor"):  # null: the ratio of the contexts
        factor = reader.take("factor", float, defaults.context / max(original, 1))
    else:
        factor = reader.take("factor", float)
    parts = {
        "factor": factor,
        "original_context": original,
        # Zero stands for an absent value in the reference.
        "beta_fast": reader.take("beta_fast", float, 32.0) or 32.0,
        "beta_slow": reader.take("beta_slow", float, 1.0) or 1.0,
        "attention_factor": reader.take("attention_factor", float, None),
        "mscale": reader.take("mscale", float, None) or None,
        "mscale_all_dim": reader.take("mscale_all_dim", float, None) or None,
        "truncate": reader.take("truncate", bool, True),
    }
    return lambda: YarnScaling(**parts)


def _longrope(reader: ConfigReader, defaults: _Defaults) -> Callable[[], RopeScaling]:
    """Without a factor it is the ratio of the contexts, which counts from 1 upwards."""
    original = _original(reader, defaults)
    parts = {
        "short_factor": _numbers(reader, "short_factor"),
        "long_factor": _numbers(reader, "long_factor"),
        "factor": reader.take("factor", float, max(1.0, defaults.context / max(original, 1))),
        "original_context": original,
        "attention_factor": reader.take("attention_factor", float, None),
    }
    return lambda: LongRopeScaling(**parts)


def _numbers(reader: ConfigReader, key: str) -> tuple[float, ...]:
    values = reader.take(key, list, [])
    if not values:
        reader.problem(f"{key} is missing; it is a list of numbers, one a rotated pair")
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        reader.problem(f"{key} is {values!r}; it must be a list of numbers")
        return ()
    return tuple(map(float, values))


def _llama3(reader: ConfigReader, defaults: _Defaults) -> Callable[[], RopeScaling]:
    parts = {
        "factor": reader.take("factor", float),
        "low_freq_factor": reader.take("low_freq_factor", float),
        "high_freq_factor": reader.take("high_freq_factor", float),
        "original_context": _original(reader, defaults),
    }
    return lambda: Llama3Scaling(**parts)


_KINDS: dict[str, Callable[[ConfigReader, _Defaults], Callable[[], RopeScaling | None]]] = {
    "default": _plain,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # its name in the first files that had it
    "llama3": _llama3,
}


def _parse(data: Mapping[str, Any], where: str, defaults: _Defaults) -> Rope:
    """One object of rope parameters.

    Raises:
      ConfigError: names the object and every problem.
    """
    reader = ConfigReader(data, where)
    theta = reader.take("rope_theta", float, defaults.theta)
    fraction = reader.take(_FRACTION, float, defaults.fraction or 1.0)
    if defaults.fraction is None and fraction != 1:
        reader.problem(f"{_FRACTION} {fraction} is not supported in this family")
    older = reader.take("type", str, "default")
    kind = reader.take("rope_type", str, older)
    if kind not in _KINDS:
        # The keys of an unknown type are no problem of their own.
        raise ConfigError(f"{where}: rope_type {kind!r} is unknown; {nearest(kind, _KINDS)}")
    make = _KINDS[kind](reader, defaults)
    return reader.finish(
        lambda: Rope(theta=theta, fraction=fraction, layout=defaults.layout, scaling=make())
    )


def _defaults(
    config: ConfigReader,
    *,
    context: int,
    theta: float | None,
    fraction: float | None,
    layout: Layout,
) -> _Defaults:
    found = config.take(_FRACTION, float, 1.0 if fraction is None else fraction)
    if fraction is None and found != 1:
        config.problem(f"{_FRACTION} {found} is not supported in this family")
    return _Defaults(
        context,
        config.take(_ORIGINAL, int, None),
        config.take("rope_theta", float, theta),
        None if fraction is None else found,
        layout,
    )


def _object(config: ConfigReader) -> tuple[Mapping[str, Any], str]:
    """The object of rope parameters in either dialect, and its key."""
    scaling = config.take("rope_scaling", dict, {})
    parameters = config.take("rope_parameters", dict, {})
    if scaling and parameters and scaling != parameters:
        config.problem("rope_scaling and rope_parameters differ; give one of them")
    return (parameters, "rope_parameters") if parameters else (scaling, "rope_scaling")


def read_rope(
    config: ConfigReader,
    *,
    context: int,
    theta: float = 10_000.0,
    fraction: float | None = None,
    layout: Layout = "half",
) -> Rope:
    """The rope of a model that has one.

    Args:
      config: reader of config.json; problems are left with it.
      context: the file's max_position_embeddings, in tokens.
      theta: base where the file names none.
      fraction: rotated part of a head where the file names none; None where the family rotates
        whole heads and knows no `partial_rotary_factor`.
      layout: which dims make a pair.
    """
    defaults = _defaults(config, context=context, theta=theta, fraction=fraction, layout=layout)
    data, where = _object(config)
    return _try(config, data, where, defaults)


def read_ropes(
    config: ConfigReader,
    thetas: Mapping[str, float],
    *,
    context: int,
    local: tuple[str, str] | None = None,
    fraction: float | None = None,
    layout: Layout = "half",
) -> dict[str, Rope]:
    """The ropes of a model whose layer types may have one each.

    Args:
      config: reader of config.json; problems are left with it.
      thetas: layer type -> base where the file names none.
      context: the file's max_position_embeddings, in tokens.
      local: (layer type, key): in the older dialect that layer type is not scaled and its base
        stands under a key of its own, as ("sliding_attention", "rope_local_base_freq"). None where
        one object holds for all layer types.
      fraction: as in `read_rope`.
      layout: as in `read_rope`.

    Returns:
      A rope for each of the layer types in `thetas`.
    """
    base = _defaults(config, context=context, theta=None, fraction=fraction, layout=layout)
    kind_of_local, own = None, None
    if local is not None:
        kind_of_local, own = local[0], config.take(local[1], float, None)
    data, where = _object(config)
    nested = any(kind in thetas for kind in data)
    if nested:
        for key in set(data) - set(thetas):
            config.problem(f"{where}: unknown layer type {key!r}; {nearest(key, thetas)}")
    elif local is not None and where == "rope_parameters":
        config.problem(f"rope_parameters names no layer type; {', '.join(thetas)} are known")
    ropes = {}
    for kind, theta in thetas.items():
        is_local = kind == kind_of_local
        wanted = own if is_local else base.theta
        defaults = dataclasses.replace(base, theta=theta if wanted is None else wanted)
        part, place = ({} if is_local else data), where
        if nested:
            part, place = data.get(kind), f"{where}.{kind}"
        ropes[kind] = _try(config, part, place, defaults)
    return ropes


def _try(config: ConfigReader, data: Any, where: str, defaults: _Defaults) -> Rope:
    """The rope, or a problem left with the config; null counts as absent."""
    if not isinstance(data, dict | None):
        config.problem(f"{where} is {data!r}; it must be of type dict")
        data = None
    try:
        return _parse(data or {}, where, defaults)
    except ConfigError as error:
        config.problem(str(error))
        return Rope()


def usable_context(declared: int, *ropes: Rope | None) -> int:
    """Tokens that a model holds, from the file's max_position_embeddings and its ropes.

    With dynamic scaling the file names the unscaled context, and with yarn it may: the scaled one
    is `factor` times as long.
    """
    longest = declared
    for rope in ropes:
        match rope.scaling if rope is not None else None:
            case DynamicScaling() | YarnScaling() as s if declared <= s.original_context:
                longest = max(longest, int(s.original_context * s.factor))
    return longest


def _words(rope: Rope) -> dict[str, Any]:
    """The scaling of a rope in the words of the file."""
    if rope.scaling is None:
        return {"rope_type": "default"}
    data = to_dict(rope.scaling)
    out = {"rope_type": data.pop("kind"), **data}
    original = out.pop("original_context", None)
    if original is not None and not isinstance(rope.scaling, DynamicScaling):
        out[_ORIGINAL] = original
    return out


def _declared(context: int, *ropes: Rope | None) -> dict[str, int]:
    """max_position_embeddings: of dynamic scaling the unscaled context."""
    scalings = [rope.scaling for rope in ropes if rope is not None]
    originals = [s.original_context for s in scalings if isinstance(s, DynamicScaling)]
    return {"max_position_embeddings": min([context, *originals])}


def write_rope(rope: Rope | None, *, context: int) -> dict[str, Any]:
    """Keys of config.json, in the dialect that old and new readers know.

    Args:
      rope: of all layers, or None.
      context: the model's, in tokens.

    Returns:
      max_position_embeddings, rope_theta, rope_scaling and, where a part of a head is rotated,
      partial_rotary_factor.
    """
    out: dict[str, Any] = _declared(context, rope)
    if rope is None:
        return out | {"rope_theta": None, "rope_scaling": None}
    out["rope_theta"] = rope.theta
    out["rope_scaling"] = None if rope.scaling is None else _words(rope)
    if rope.fraction != 1:
        out[_FRACTION] = rope.fraction
    return out


def write_ropes(ropes: Mapping[str, Rope], *, context: int) -> dict[str, Any]:
    """Keys of config.json for ropes by layer type: max_position_embeddings and rope_parameters."""
    out: dict[str, Any] = _declared(context, *ropes.values())
    out["rope_parameters"] = {
        kind: _words(rope)
        | {"rope_theta": rope.theta}
        | ({} if rope.fraction == 1 else {_FRACTION: rope.fraction})
        for kind, rope in ropes.items()
    }
    return out
