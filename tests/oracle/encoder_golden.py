"""The golden files of scripts/make_encoder_goldens.py, and how a spec is run on their rows."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.nn import api
from jaxllm.state.step import training_step
from tests.oracle.golden import FOLDER, files
from tests.oracle.mutate import POLICY

NAMES = tuple(sorted(path.parent.name for path in FOLDER.glob("*/encoder.npz")))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Files of an encoder, and what transformers makes of two rows in float32.

    Attributes:
      source: the directory.
      ids: [2, T]; types, marks: the same; lengths: [2], real tokens.
      hidden: [2, T, D], zeros at padding.
      logits: [2, T, V] or None.
      provenance: generator, versions, hashes, noise.
    """

    source: Path
    ids: np.ndarray
    types: np.ndarray
    marks: np.ndarray
    lengths: np.ndarray
    hidden: np.ndarray
    logits: np.ndarray | None
    provenance: dict[str, Any]

    @property
    def real(self) -> np.ndarray:
        """[2, T] which tokens are no padding."""
        return np.arange(self.ids.shape[1])[None] < self.lengths[:, None]


@cache
def rows(name: str) -> Rows:
    """Read one golden directory; its files must be those that the numbers were made from."""
    folder = files(name)
    with np.load(folder / "encoder.npz") as held:
        fields = {f.name: held.get(f.name) for f in dataclasses.fields(Rows) if f.name != "source"}
    fields["provenance"] = json.loads(str(fields["provenance"]))
    return Rows(source=folder, **fields)


def outputs(spec, params, want, policy=POLICY):
    """{hidden, logits} of the golden rows, zeros at padding."""
    step = dataclasses.replace(
        training_step(*want.ids.shape),
        lengths=jnp.asarray(want.lengths),
        marks=jnp.asarray(want.marks) if want.marks.any() else None,
    )
    types = jnp.asarray(want.types) if spec.embedding.types else None
    inputs = api.Inputs(jnp.asarray(want.ids), types=types)
    hidden, _, _ = api.apply(spec, params, inputs, step, policy=policy)
    out = {"hidden": hidden}
    if spec.head.logits:
        out["logits"] = api.unembed(spec, params, hidden, policy=policy)
    return {k: np.where(want.real[..., None], v, 0) for k, v in out.items()}
