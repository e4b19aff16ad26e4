"""A checkpoint in whose tensors a quantization method finds its leaves; problems are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxllm.core.packing import checked_leaf
from jaxllm.core.qarray import QArray
from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.zoo.reader import Reader

__all__ = ["Source", "nibbles"]


def nibbles(words: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Eight codes of each 32-bit word as int8, along a dim; code order[j] is in bits 4 j."""
    words = np.ascontiguousarray(words).view(np.uint32)
    places = np.argsort(order)
    codes = np.stack([(words >> np.uint32(4 * j)) & np.uint32(15) for j in places], axis=axis + 1)
    shape = list(words.shape)
    shape[axis] *= 8
    return codes.astype(np.int8).reshape(shape)


class Source:
    """The tensors of a checkpoint, the leaves found among them, and what is wrong with them."""

    def __init__(self, reader: Reader, where: str):
        self.reader = reader
        self.where = where
        self.leaves: dict[str, tuple[tuple[int, ...], Callable[[], QArray]]] = {}
        self.used: set[str] = set()
        self.inputs_first: set[str] = set()
        self.problems: list[str] = []

    def names(self, suffix: str) -> Iterable[str]:
        """What stands before a suffix in the names that have it."""
        return [n.removesuffix(suffix) for n in self.reader.tensors if n.endswith(suffix)]

    def problem(self, message: str) -> None:
        """Remember a problem; `finish` raises all of them."""
        self.problems.append(message)

    def have(self, *names: str) -> bool:
        """Whether all tensors are there; those that are not become problems."""
        missing = [name for name in names if name not in self.reader.tensors]
        for name in missing:
            self.problem(f"{name} is missing")
        return not missing

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self.reader.tensors[name].shape

    def shaped(self, name: str, *allowed: tuple[int, ...]) -> bool:
        """Whether a tensor is there in one of the allowed shapes; else that becomes a problem."""
        if not self.have(name):
            return False
        if self.shape(name) not in allowed:
            wanted = " or ".join(map(str, allowed))
            self.problem(f"{name} has shape {self.shape(name)}, not {wanted}")
            return False
        return True

    def add(
        self, name: str, shape: tuple[int, ...], make: Callable[[], QArray], used: Iterable[str]
    ) -> None:
        """A leaf of logical shape [out, in] under the name of a plain tensor."""
        self.leaves[name] = (shape, lambda: checked_leaf(make(), name))
        self.used.update(used)

    def number(
        self, config: Mapping[str, Any], key: str, allowed: tuple[int, ...] | None, default: Any
    ) -> int:
        """A whole number of the config.

        Raises:
          WeightsError: it is none; UnsupportedError: it is none of those allowed.
        """
        value = config.get(key, default)
        if type(value) is not int:
            raise WeightsError(f"{self.where}: quantization_config.{key} is {value!r}, no number")
        if allowed is not None and value not in allowed:
            raise UnsupportedError(
                f"{self.where}: quantization_config.{key} is {value}; supported: "
                f"{', '.join(map(str, allowed))}"
            )
        return value

    def group(self, config: Mapping[str, Any]) -> int:
        """`group_size`: at least 1, or -1 for whole rows.

        Raises:
          WeightsError: it is neither.
        """
        size = self.number(config, "group_size", None, -1)
        if size < 1 and size != -1:
            raise WeightsError(
                f"{self.where}: quantization_config.group_size is {size}; allowed is 1 or more, or "
                "-1 for whole rows"
            )
        return size

    def finish(self) -> None:
        """Raise all problems at once.

        Raises:
          WeightsError: there are any, or there is no quantized tensor.
        """
        if not self.problems and not self.leaves:
            self.problem("quantization_config is there, but no quantized tensor")
        if self.problems:
            more = f"; and {len(self.problems) - 6} more" if len(self.problems) > 6 else ""
            raise WeightsError(f"{self.where}: {'; '.join(self.problems[:6])}{more}")
