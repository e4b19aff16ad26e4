"""A quantized leaf as named plain arrays and JSON-ready facts, for files; and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxllm.core.qarray import FORMATS, QArray, value_dtype
from jaxllm.errors import WeightsError

__all__ = [
    "apart",
    "checked_leaf",
    "four_bits",
    "nibbles",
    "packed_arrays",
    "packed_facts",
    "together",
    "unpacked",
    "wanted_arrays",
]

_FACTS = ("format", "shape", "inputs", "group", "rows", "version", "activations")


def nibbles(values: np.ndarray) -> np.ndarray:
    """int4 or uint4 [..., I] as bytes [..., I / 2], the even one below."""
    codes = values.astype(np.int8).view(np.uint8) & 15
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _from_nibbles(packed: np.ndarray, dtype: Any) -> np.ndarray:
    both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    signed = both.astype(np.int8)
    return (((signed ^ 8) - 8) if dtype.name == "int4" else signed).astype(dtype)


def four_bits(dtype: Any) -> bool:
    """Whether two values of a dtype share a byte in files."""
    return str(dtype) in ("int4", "uint4")


def packed_arrays(leaf: QArray, prefix: str = "") -> dict[str, np.ndarray]:
    """Its arrays by name: `values`, `scale`, … and `scale.values`, … of scales that are quantized.

    Two values of four bits share a byte (an odd number of them in a row has a byte each).
    """
    values = np.asarray(leaf.values)
    if four_bits(values.dtype):
        whole = values.shape[-1] % 2 == 0
        values = nibbles(values) if whole else values.astype(np.int8)
    out = {f"{prefix}values": values}
    if isinstance(leaf.scale, QArray):
        out |= packed_arrays(leaf.scale, f"{prefix}scale.")
    else:
        out[f"{prefix}scale"] = np.asarray(leaf.scale)
    for name in ("offset", "order"):
        if getattr(leaf, name) is not None:
            out[f"{prefix}{name}"] = np.asarray(getattr(leaf, name))
    return out


def packed_facts(leaf: QArray) -> dict[str, Any]:
    """What is not in the arrays."""
    facts = {name: getattr(leaf, name) for name in _FACTS}
    facts["shape"] = list(leaf.shape)
    facts["arrays"] = [name for name in ("offset", "order") if getattr(leaf, name) is not None]
    if isinstance(leaf.scale, QArray):
        facts["scale"] = packed_facts(leaf.scale)
    return facts


def _checked(facts: Any, where: str) -> dict[str, Any]:
    """The facts, if they can be those of a leaf."""

    def whole(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    sound = (
        isinstance(facts, dict)
        and facts.get("format") in FORMATS
        and isinstance(facts.get("shape"), list)
        and len(facts["shape"]) > 0
        and all(whole(n, 1) for n in facts["shape"])
        and whole(facts.get("inputs"), 0)
        and facts["inputs"] < len(facts["shape"])
        and all(whole(facts.get(name), 1) for name in ("group", "rows", "version"))
        and facts["version"] in (1, 2, 3)
        and isinstance(facts.get("arrays"), list)
        and type(facts.get("activations", False)) is bool
    )
    if not sound:
        raise WeightsError(
            f"{where}: is described by {str(facts)[:120]}, which is no quantized leaf"
        )
    return {"activations": False} | facts


def wanted_arrays(facts: Any, where: str, prefix: str = "") -> list[str]:
    """Names of the arrays that a description calls for.

    Raises:
      WeightsError: the description is damaged.
    """
    facts = _checked(facts, where)
    names = [f"{prefix}values", *(f"{prefix}{name}" for name in facts["arrays"])]
    if "scale" in facts:
        return names + wanted_arrays(facts["scale"], where, f"{prefix}scale.")
    return [*names, f"{prefix}scale"]


def unpacked(
    facts: Mapping[str, Any], read: Callable[[str], np.ndarray], where: str, prefix: str = ""
) -> QArray:
    """The leaf that `packed_facts` and `packed_arrays` describe.

    Args:
      facts: of the leaf.
      read: name -> array.
      where: the leaf's name, for messages.
      prefix: of the arrays' names.

    Raises:
      WeightsError: arrays that do not fit the description or each other.
    """
    facts = _checked(facts, where)
    fields = {name: facts[name] for name in _FACTS}
    fields["shape"] = tuple(facts["shape"])
    values = read(f"{prefix}values")
    dtype = value_dtype(fields["format"])
    width = QArray(values, None, **fields).num_inputs
    if four_bits(dtype) and fields["version"] != 2:
        halved = values.dtype == np.uint8 and values.shape[-1] * 2 == width
        values = _from_nibbles(values, dtype) if halved else values.astype(dtype)
    scale: Any
    if "scale" in facts:
        scale = unpacked(facts["scale"], read, where, f"{prefix}scale.")
    else:
        scale = read(f"{prefix}scale")
    rest = {name: read(f"{prefix}{name}") for name in facts["arrays"]}
    return checked_leaf(QArray(values, scale, **rest, **fields), where)


def checked_leaf(leaf: QArray, where: str) -> QArray:
    """The leaf, if its arrays fit together.

    Raises:
      WeightsError: they do not; the message names the leaf.
    """
    outputs, inputs = leaf.num_outputs, leaf.num_inputs
    wanted = (outputs, inputs // 2 if leaf.version == 2 else inputs)
    if tuple(leaf.values.shape[-2:]) != wanted:
        raise WeightsError(f"{where}: values have shape {leaf.values.shape}, not {wanted}")
    dtype = np.dtype(np.uint8) if leaf.version == 2 else value_dtype(leaf.format)
    if leaf.values.dtype != dtype:
        raise WeightsError(f"{where}: values have dtype {leaf.values.dtype}, not {dtype}")
    blocks = (-(-outputs // leaf.rows), -(-inputs // leaf.group))
    nested = isinstance(leaf.scale, QArray)
    for name, array in (("scale", leaf.scale.values if nested else leaf.scale), *_offset(leaf)):
        found = tuple(array.shape[-2:])
        fits = all(n in (1, whole) for n, whole in zip(found, blocks, strict=True))
        if len(found) != 2 or not fits:
            raise WeightsError(
                f"{where}: {name} has shape {tuple(array.shape)}; blocks of {leaf.rows} x "
                f"{leaf.group} in {outputs} x {inputs} need {blocks}"
            )
    if leaf.order is not None:
        order = np.asarray(leaf.order)
        if order.shape[-1:] != (inputs,) or not (np.sort(order, -1) == np.arange(inputs)).all():
            raise WeightsError(f"{where}: the order of inputs is none of 0..{inputs - 1}")
    return leaf


def _offset(leaf: QArray) -> list[tuple[str, Any]]:
    return [] if leaf.offset is None else [("offset", leaf.offset)]


def apart(
    leaves: Iterable[tuple[str, Any]], facts: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, leaf) as (path, plain array), the facts of quantized leaves put into `facts`."""
    for path, leaf in leaves:
        if isinstance(leaf, QArray):
            facts[path] = packed_facts(leaf)
            for name, array in packed_arrays(leaf).items():
                yield f"{path}.{name}", array
        else:
            yield path, leaf


def together(
    arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The leaves that `apart` took apart, one at a time."""
    for path, array in arrays.items():
        parent = path.rpartition(".values")[0]
        if path.endswith(".values") and parent in facts:
            yield parent, unpacked(facts[parent], lambda n, p=parent: arrays[f"{p}.{n}"], parent)
        elif not any(path.startswith(f"{name}.") for name in _parents(path) if name in facts):
            yield path, array


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
