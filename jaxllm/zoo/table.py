"""How a family is described: reading a config to the last key, and invertible weight names."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.param import ParamDef

__all__ = ["ConfigReader", "Entry", "Family", "Form", "join"]

Form = Literal[
    "linear",
    "plain",
    "interleaved",
    "in_out",
    "same",
    "conv",
    "conv_rows",
    "one_more",
    "minus_exp",
]
_MISSING = object()


def _some(kind: type) -> Any:
    """A value to read on with, where a problem has been found."""
    return kind() if kind in (dict, list) else kind(1)


class ConfigReader:
    """A config's keys, each of which must be taken or ignored; problems are raised all at once."""

    def __init__(self, data: Mapping[str, Any], where: str):
        self._data = data
        self._where = where
        self._seen: set[str] = set()
        self._problems: list[str] = []

    def take(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        """The value of a key; null counts as absent. A wrong type or a missing key is a problem."""
        self._seen.add(key)
        value = self._data.get(key)
        if value is None:
            if default is not _MISSING:
                return default
            self.problem(f"{key} is missing")
            return _some(kind)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.problem(f"{key} is {value!r}; it must be of type {kind.__name__}")
            return _some(kind) if default is _MISSING else default
        if kind in (int, float) and not (value >= 0 and math.isfinite(value) and value < 2**48):
            self.problem(f"{key} is {value!r}; it must be finite and not negative")
            return kind(1)
        return value

    def has(self, key: str) -> bool:
        """Whether the config names a key, be it null."""
        return key in self._data

    def auto(self, key: str) -> bool:
        """Whether a key says `auto`, or nothing."""
        self._seen.add(key)
        return self._data.get(key) in (None, "auto")

    def fixed(self, **values: Any) -> None:
        """Keys of which one value is known; another is a problem."""
        for key, value in values.items():
            if (found := self.take(key, type(value), value)) != value:
                self.problem(f"{key} is {found!r}; supported is {value!r}")

    def attempt[T](self, make: Callable[[], T]) -> T | None:
        """What `make` makes, or None where its contradiction became a problem."""
        try:
            return make()
        except ConfigError as error:
            self.problem(str(error))
            return None

    def ignore(self, *keys: str) -> None:
        """Keys that do not change what the model computes at inference."""
        self._seen.update(keys)

    def translated(self, data: Mapping[str, Any], part: str = "") -> ConfigReader:
        """A reader of other words for what this one read, once nothing is left unread in it.

        Args:
          data: the words.
          part: of the file, where they are not all of it; named in messages.
        """
        self.finish()
        return ConfigReader(data, f"{self._where}: {part}" if part else self._where)

    def problem(self, message: str) -> None:
        """Remember a problem; `finish` raises all of them."""
        self._problems.append(message)

    def finish(self, make: Callable[[], Any] = lambda: None) -> Any:
        """Raise if there was a problem or a key that nobody asked for; else give what `make` makes.

        Raises:
          ConfigError: names the file and every problem, or the contradiction that `make` met.
        """
        unknown = [key for key in self._data if key not in self._seen]
        for key in unknown:
            near = difflib.get_close_matches(key, self._seen, 1)
            hint = f" (nearest known: {near[0]})" if near else ""
            self._problems.append(f"unknown key {key!r}{hint}")
        if self._problems:
            shown = "; ".join(self._problems[:8])
            more = f"; and {len(self._problems) - 8} more" if len(self._problems) > 8 else ""
            raise ConfigError(f"{self._where}: {shown}{more}")
        try:
            return make()
        except ConfigError as error:
            raise ConfigError(f"{self._where}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor on disk, the unstacked path that it fills, and how the two are laid out.

    Forms: `plain` is a reshape; `linear` is [out, in] on disk and [*in, *out] here; `interleaved`
    is `linear` (or a bias) whose rotary rows are paired 2i, 2i + 1 on disk and i, i + H/2 here;
    `in_out` is [in, out] on disk as here, `same` has our shape there too; `conv` is a depthwise
    convolution, [channels, 1, W] on disk and [W, *channels] here, `conv_rows` [channels, W]. In
    GGUF some values stand otherwise: `one_more` is `plain`, of x + 1, and `minus_exp` is `same`, of
    -exp(x).

    Several leaves may fill one tensor: each is then a `part` (first output, number of outputs of
    the whole tensor), as q, k and v in `qkv_proj`. With `groups` the tensor is so many equal
    stretches of outputs, and `part` is a leaf's place and the outputs of all in each of them: a
    head's queries beside its keys, a gate's output beside one of `up`. Several tensors may fill one
    leaf of experts: each is then the expert `index` of it. Where the tensor has all experts, it has
    a leading dim for them, before those of one. `same` with `ones` has so many dims of 1 before and
    after ours on disk.
    """

    disk: str
    path: str
    form: Form = "linear"
    part: tuple[int, int] | None = None
    groups: int = 1
    index: int | None = None
    ones: tuple[int, int] = (0, 0)

    def _own(self, definition: ParamDef) -> ParamDef:
        """What of the leaf stands in the tensor: one expert, or all of it."""
        return definition if self.index is None else definition.unstack()

    def part_shape(self, definition: ParamDef) -> tuple[int, ...]:
        """Shape of this leaf on disk: matrices [out, in], vectors flat, tables as they are."""
        own = self._own(definition)
        if self.form in ("same", "minus_exp"):
            return (1,) * self.ones[0] + own.shape + (1,) * self.ones[1]
        if self.form in ("conv", "conv_rows"):
            between = (1,) if self.form == "conv" else ()
            return (own.size // own.shape[0], *between, own.shape[0])
        stack, one = own.shape[: own.lead], own.shape[own.lead :]
        if not own.std:
            return (*stack, math.prod(one))
        if not own.inputs:
            return own.shape
        fan_in = math.prod(one[: own.inputs])
        shape = (math.prod(one) // fan_in, fan_in)
        return (*stack, *(shape[::-1] if self.form == "in_out" else shape))

    def axis(self, definition: ParamDef) -> int:
        """The dim of outputs on disk, on which parts are joined."""
        own = self._own(definition)
        return own.lead + int(self.form == "in_out" and own.inputs > 0)

    def disk_shape(self, definition: ParamDef) -> tuple[int, ...]:
        """Shape of the whole tensor on disk."""
        shape = list(self.part_shape(definition))
        if self.part is not None:
            shape[self.axis(definition)] = self.part[1] * self.groups
        return tuple(shape)

    def to_ours(self, array: np.ndarray, definition: ParamDef) -> np.ndarray:
        """From the whole tensor on disk to the canonical leaf, or to the expert `index` of it."""
        own = self._own(definition)
        if self.part is not None:
            axis, size = self.axis(definition), self.part_shape(definition)
            cut = array.reshape(*size[:axis], self.groups, self.part[1], *size[axis + 1 :])
            stop = self.part[0] + size[axis] // self.groups
            array = cut[(slice(None),) * (axis + 1) + (slice(self.part[0], stop),)].reshape(size)
        if self.form == "interleaved":
            head_dim = own.shape[-1]
            paired = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
            array = paired.swapaxes(1, 2).reshape(array.shape)
        if self.form in ("linear", "interleaved") and array.ndim == own.lead + 2:
            array = array.swapaxes(-1, -2)
        if self.form in ("conv", "conv_rows"):
            array = array.reshape(array.shape[0], -1).T
        if self.form == "one_more":
            array = array.astype(np.float32) - 1
        if self.form == "minus_exp":
            array = np.log(-array.astype(np.float32))
        return array.reshape(own.shape)

    def to_disk(self, array: np.ndarray, definition: ParamDef) -> np.ndarray:
        """From the canonical leaf to its part on disk; the inverse of `to_ours`."""
        array = array if self.index is None else array[self.index]
        lead, shape = self._own(definition).lead, self.part_shape(definition)
        if self.form in ("linear", "interleaved") and len(shape) == lead + 2:
            out = array.reshape(*shape[:lead], shape[-1], shape[-2]).swapaxes(-1, -2)
        elif self.form in ("conv", "conv_rows"):
            out = array.reshape(shape[-1], shape[0]).T.reshape(shape)
        elif self.form == "one_more":
            out = (array.astype(np.float32) + 1).reshape(shape)
        elif self.form == "minus_exp":
            out = -np.exp(array.astype(np.float32)).reshape(shape)
        else:
            out = array.reshape(shape)
        if self.form == "interleaved":
            halves = out.reshape(-1, 2, array.shape[-1] // 2, *out.shape[1:])
            out = halves.swapaxes(1, 2).reshape(out.shape)
        return np.ascontiguousarray(out)


def join(parts: Sequence[Entry], arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """A tensor from what `to_disk` gives for each of its parts, in their order."""
    if len(arrays) == 1:
        return arrays[0]
    groups = parts[0].groups
    cut = [a.reshape(*a.shape[:axis], groups, -1, *a.shape[axis + 1 :]) for a in arrays]
    whole = np.concatenate(cut, axis=axis + 1)
    return whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])


def _no_gguf(*_: Any) -> Any:
    raise UnsupportedError("this family is not read from GGUF files")


@dataclasses.dataclass(frozen=True)
class Family:
    """A public family: how its files are read and written.

    Attributes:
      model_types: values of `model_type` in config.json.
      read: config.json -> spec.
      write: spec -> config.json, or None where the family cannot say it.
      names: spec -> entries of the Hugging Face layout.
      architectures: values of `general.architecture` in GGUF.
      read_gguf: GGUF metadata -> spec; for `architectures` alone.
      gguf_names: (spec, architecture) -> entries of the GGUF layout.
      ignored: globs of tensors that carry nothing the model needs.
      spare: a tensor by which a layer past the last shows that it predicts further tokens; such
        layers are left out.
      prefix: of the names on disk, which files of the bare body lack.
      head_tensor: a tensor by which a file shows that it has a head of logits; it outweighs
        `architectures` in config.json. Empty where every file has one.
      older: endings of names -> what they are in early files.
    """

    model_types: tuple[str, ...]
    read: Callable[[ConfigReader], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any] | None]
    names: Callable[[ModelSpec], list[Entry]]
    architectures: tuple[str, ...] = ()
    read_gguf: Callable[[ConfigReader, Mapping[str, Any]], ModelSpec] = _no_gguf
    gguf_names: Callable[[ModelSpec, str], list[Entry]] = _no_gguf
    ignored: tuple[str, ...] = ()
    spare: str = ""
    prefix: str = ""
    head_tensor: str = ""
    older: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def spared(self, layers: int, tensors: Collection[str]) -> list[str]:
        """Globs of the tensors of layers that predict further tokens, after so many layers."""
        found = []
        while self.spare and f"model.layers.{layers}.{self.spare}" in tensors:
            found.append(f"model.layers.{layers}.*")
            layers += 1
        return found

    def locate(self, entry: Entry, tensors: Collection[str]) -> Entry:
        """The entry under the name that the file has: with the prefix or not, or an older one."""
        bare = entry.disk.removeprefix(self.prefix)
        names = [entry.disk, self.prefix + bare, bare]
        for new, old in self.older.items():
            names += [n.removesuffix(new) + old for n in names if n.endswith(new)]
        disk = next((name for name in names if name in tensors), entry.disk)
        return dataclasses.replace(entry, disk=disk)
