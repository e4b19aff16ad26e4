"""Packed documents for tests of what may cross their borders."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.policy import Policy
from jaxllm.data.batch import Batch
from jaxllm.data.packing import pack
from jaxllm.data.rows import Packed
from jaxllm.data.shards import Shards, ShardWriter
from jaxllm.errors import UnsupportedError
from jaxllm.nn import api
from jaxllm.nn.decoder import Inputs
from jaxllm.ops.attention import IMPLEMENTATIONS, Call, choose
from jaxllm.ops.loss import LossOptions
from jaxllm.spec.model import ModelSpec
from jaxllm.state.step import training_step
from jaxllm.train.step import batch_loss
from tests.contracts.specs import quick

LENGTH = 16
# Rows of a 16: documents of several sizes, one that fills a row, one that is cut in two.
SIZES = (5, 3, 7, 16, 2, 9, 21, 4)


def served(platform: str, dtype: str, head_dim: int) -> list[str]:
    """The attention implementations that can run."""
    out = []
    for name in IMPLEMENTATIONS:
        try:
            choose(name, Call(platform=platform, dtype=dtype, head_dim=head_dim, form="band"))
        except UnsupportedError:
            continue
        out.append(name)
    return out


def documents(folder: Any, vocab: int = 64) -> Packed:
    """Random tokens in documents, packed."""
    ids = np.random.default_rng(0).integers(0, vocab, sum(SIZES))
    with ShardWriter(folder, "uint16") as writer:
        writer.begin_documents(np.cumsum([0, *SIZES[:-1]]).tolist())
        writer.append(ids)
    shards = Shards.open(folder, writer.facts())
    return Packed(shards, pack(shards.begins, LENGTH), LENGTH)


@functools.partial(quick, static_argnames=("spec", "policy"))
def _pull(spec: ModelSpec, params: Any, batch: Batch, embeds: Any, *, policy: Policy) -> Any:
    """Gradient of the loss with respect to given embeddings."""

    def total(embeds: Any) -> Any:
        step = training_step(
            *batch.tokens.shape, segment_ids=batch.segment_ids, positions=batch.positions
        )
        marked = jnp.ones(batch.tokens.shape, bool)
        inputs = Inputs(batch.tokens, embeds, marked)
        hidden, _, _ = api.apply(spec, params, inputs, step, policy=policy)
        logits = jax.nn.log_softmax(api.unembed(spec, params, hidden, policy=policy))
        picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch.weights)

    return jax.grad(total)(embeds)


def check_no_gradient_crosses(spec: ModelSpec, rows: Packed, policy: Policy) -> None:
    """Exactly zero outside of the document, and not zero inside of it."""
    batch = rows.consecutive(0, rows.count)
    params = quick(api.init, static_argnums=0)(spec, jax.random.key(0))
    random = np.random.default_rng(1)
    embeds = random.standard_normal((*batch.tokens.shape, spec.width)).astype(np.float32)
    checked = 0
    for row, number in np.ndindex(rows.count, int(batch.segment_ids.max())):
        mine = np.zeros(batch.tokens.shape, bool)
        mine[row] = batch.segment_ids[row] == number + 1
        if not (mine & (batch.weights > 0)).any():
            continue
        weights = np.where(mine, batch.weights, 0).astype(np.float32)
        alone = Batch(batch.tokens, batch.targets, weights, batch.segment_ids, batch.positions)
        found = np.asarray(_pull(spec, params, alone, jnp.asarray(embeds), policy=policy))
        assert np.array_equal(found[~mine], np.zeros_like(found[~mine]))
        used = np.flatnonzero(mine[row] & (batch.weights[row] > 0))
        assert (np.abs(found[row, used]).max(axis=-1) > 0).all()
        checked += 1
    assert checked == len(rows.packing.starts)


def losses(spec: ModelSpec, rows: Packed, policy: Policy) -> list[tuple[float, float]]:
    """(loss in its packed row, loss alone in a row) of every piece of a document."""
    batch = rows.consecutive(0, rows.count)
    params = quick(api.init, static_argnums=0)(spec, jax.random.key(0))

    @quick
    def loss(batch: Batch) -> Any:
        return batch_loss(spec, params, batch, policy=policy, options=LossOptions(), key=None).loss

    out = []
    for row, number in np.ndindex(rows.count, int(batch.segment_ids.max())):
        here = np.flatnonzero(batch.segment_ids[row] == number + 1)
        if not len(here):
            continue
        weights = np.zeros_like(batch.weights)
        weights[row, here] = batch.weights[row, here]
        together = Batch(batch.tokens, batch.targets, weights, batch.segment_ids, batch.positions)

        def single(values: Any, here: Any = here, row: int = row) -> Any:
            padded = np.zeros((1, LENGTH), values.dtype)
            padded[0, : len(here)] = values[row, here]
            return padded

        alone = Batch(single(batch.tokens), single(batch.targets), single(batch.weights))
        out.append((float(loss(together)), float(loss(alone))))
    return out
