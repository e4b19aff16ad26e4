"""SmolLM2-135M-Instruct, the real model, against transformers in float32 on the same GGUF file.

The file is looked for in the user's own cache: `jaxllm pull smollm2-135m-instruct` puts it there.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.core.mesh import make_mesh
from jaxllm.infer import generate
from jaxllm.nn import api
from jaxllm.state.dense import dense_state
from jaxllm.state.step import dense_step
from jaxllm.zoo.pull import CATALOGUE
from tests.oracle.golden import FOLDER, TOLERANCE, relative

pytestmark = pytest.mark.slow

NAME = "smollm2-135m-instruct"
GOLDEN = json.loads((FOLDER / "smollm2.json").read_text())
CHATS, PARAGRAPH = GOLDEN["chats"], GOLDEN["paragraph"]
# The paragraph, and the same tokens backwards: two rows, so that a data axis has something to cut.
IDS = np.asarray([PARAGRAPH["ids"], PARAGRAPH["ids"][::-1]], np.int32)


@pytest.fixture(scope="module")
def source():
    """The GGUF file that the golden numbers were made from."""
    (file,) = CATALOGUE[NAME].files
    path = Path(os.environ["JAXLLM_REAL_CACHE"]) / "models" / NAME / file.name
    if not path.exists():
        pytest.skip(f"{path} is not there: jaxllm pull {NAME}")
    assert file.sha256 == GOLDEN["provenance"]["gguf_sha256"]
    return path


@pytest.fixture(scope="module")
def model(source):
    return jaxllm.load(source, dtype="float32", store=False)


@pytest.fixture(scope="module")
def full(model):
    """Logits [2, T, V] of one full forward pass."""
    return model.logits(IDS)


def test_packed_weights_are_the_file(source, model, full):
    """Four-bit values as the file has them: under a fifth of float32, the same likelihoods."""
    packed = jaxllm.load(source, dtype="float32", store=False, packed=True)
    assert packed.nbytes < model.nbytes / 5
    found = packed.logits(IDS)

    def nll(logits):
        logs = jax.nn.log_softmax(jnp.asarray(logits)[:, :-1], axis=-1)
        return -float(jnp.take_along_axis(logs, IDS[:, 1:, None], axis=-1).mean())

    assert abs(nll(found) - nll(full)) < 1e-4
    assert relative(found, full) < 10 * TOLERANCE


def answer(model, chat):
    """Greedy tokens of a chat."""
    return model.generate(chat["messages"], max_tokens=24, temperature=0.0).token_ids


@pytest.mark.parametrize("index", range(len(CHATS)))
def test_greedy_answers(index, model):
    chat = CHATS[index]
    assert model.prompt_ids(chat["messages"]) == chat["prompt_ids"]
    assert answer(model, chat) == chat["greedy"]


def test_logits_and_likelihood(model, full):
    assert model.tokenizer.encode(PARAGRAPH["text"])[:64] == PARAGRAPH["ids"]
    row = full[0].astype(np.float64)
    assert row.argmax(axis=-1).tolist() == PARAGRAPH["top_ids"]
    error = np.abs(row.max(axis=-1) - PARAGRAPH["top_logits"]).max() / PARAGRAPH["largest_logit"]
    shifted = row[:-1] - row[:-1].max(axis=-1, keepdims=True)
    picked = np.take_along_axis(shifted, IDS[0, 1:, None], axis=-1)[:, 0]
    nll = float((np.log(np.exp(shifted).sum(axis=-1)) - picked).mean())
    print(f"logits {error:.1e}, nll {nll:.6f}, transformers {PARAGRAPH['nll']:.6f}")
    assert error < TOLERANCE
    assert abs(nll - PARAGRAPH["nll"]) < 1e-3


def cached_logits(model, ids, sizes, *, fresh):
    """Logits of ids, given in pieces of these sizes through the state.

    Args:
      fresh: whether the first piece attends to its own keys alone, as a prefill does.
    """

    def piece(params, ids, state, start, fresh):
        step = dense_step(start, ids.shape[1], fresh=fresh)
        hidden, state, _ = api.apply(model.spec, params, ids, step, state, policy=model.policy)
        return api.unembed(model.spec, params, hidden, policy=model.policy), state

    run = jax.jit(piece, static_argnums=4)
    segments = model.generator.setup.segments
    state = dense_state(model.spec, len(ids), 96, dtype=np.float32, segments=segments)
    out, start = [], 0
    for size in sizes:
        begin = jnp.full((len(ids),), start, jnp.int32)
        part = ids[:, start : start + size]
        logits, state = run(model.params, part, state, begin, fresh and start == 0)
        out.append(np.asarray(logits))
        start += size
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize(
    ("sizes", "fresh"),
    [((48, *[1] * 16), True), ((16,) * 4, False)],
    ids=["prefill and decode", "chunked prefill"],
)
def test_pieces_through_the_cache_equal_the_full_pass(sizes, fresh, model, full):
    error = relative(cached_logits(model, IDS, sizes, fresh=fresh), full)
    print(f"{error:.1e}")
    assert error < TOLERANCE


def test_a_prompt_in_chunks_gives_the_same_answer(model, monkeypatch):
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 128)
    (chat,) = (c for c in CHATS if len(c["prompt_ids"]) > 256)
    assert answer(model, chat) == chat["greedy"]
    assert any("prefill-chunk-greedy-b1-t128" in name for name in model.generator.loaded)


def test_eight_devices_give_the_same(source, full):
    mesh = make_mesh({"data": 2, "tensor": 4})
    model = jaxllm.load(source, dtype="float32", mesh=mesh, store=False)
    assert len(model.params["embed"]["table"].sharding.device_set) == 8
    error = relative(model.logits(IDS), full)
    print(f"{error:.1e}")
    assert error < TOLERANCE
    some = [c for c in CHATS if len(c["prompt_ids"]) <= 64][:2]
    answers = model.generate_batch([c["messages"] for c in some], max_tokens=24)
    assert [a.token_ids for a in answers] == [c["greedy"] for c in some]
