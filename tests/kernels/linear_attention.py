"""Cases of linear attention with the delta rule or decays a channel, and drawn inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention import linear_attention

NAMES = ("out", "final", "dq", "dk", "dv", "ddecay", "dbeta", "dinitial")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; sequences begin at `starts`, in every row alike."""

    length: int
    heads: int = 2
    key_heads: int = 1
    width: int = 64
    state: int = 64
    batch: int = 1
    delta: bool = True
    decay: str | None = "head"  # or "channel"
    strong: float = 0.25  # size of log decays
    starts: tuple[int, ...] = ()
    initial: bool = True

    def segment_ids(self) -> np.ndarray | None:
        if not self.starts:
            return None
        marks = np.zeros((self.batch, self.length), np.int32)
        marks[:, list(self.starts)] = 1
        return np.cumsum(marks, axis=1, dtype=np.int32)


CASES = {
    "gated delta rule": Case(length=136, heads=4, key_heads=2, batch=2),
    "delta rule by channel, sequences": Case(
        length=136, decay="channel", starts=(1, 64, 70, 127), initial=False
    ),
    "by channel": Case(length=72, delta=False, decay="channel", batch=2),
    "delta rule, no decay, odd widths": Case(length=40, decay=None, width=72, state=48),
    "one token": Case(length=1, decay="channel", initial=False),
    "wide": Case(length=130, width=128, state=128),
    "sequences": Case(length=200, starts=(0, 3, 64, 130)),
    "strong decays by channel": Case(length=100, decay="channel", strong=20.0),
    "strong decays": Case(length=100, strong=60.0),
}


def arguments(case: Case) -> tuple:
    """q, k, v, log_decay, beta, initial, and gradients of the result and of the last matrices, in
    float32, rounded to bfloat16 where a kernel takes it so."""
    random = np.random.default_rng(0)

    def of(*shape):
        return random.standard_normal(shape).astype(np.float32)

    def narrow(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))

    tokens = (case.batch, case.length)
    q, k = (of(*tokens, case.key_heads, case.state) for _ in range(2))
    q, k = (narrow(x / np.linalg.norm(x, axis=-1, keepdims=True)) for x in (q, k))
    v, do = (narrow(of(*tokens, case.heads, case.width)) for _ in range(2))
    shape = (*tokens, case.heads) if case.decay == "head" else (*tokens, case.heads, case.state)
    decay = None if case.decay is None else -case.strong * np.square(of(*shape))
    beta = 2 / (1 + np.exp(-of(*tokens, case.heads))) if case.delta else None  # up to 2
    state = (case.batch, case.heads, case.state, case.width)
    initial, dfinal = of(*state), of(*state)
    return q, k, v, decay, beta, initial * case.initial, do, dfinal


def by_hand(case: Case, given: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Result and last matrices token by token in float64."""
    q, k, v, decay, beta, state = (None if z is None else z.astype(np.float64) for z in given[:6])
    q, k = (np.repeat(z, case.heads // case.key_heads, axis=2) for z in (q, k))
    decay = np.zeros(v.shape[:3]) if decay is None else decay
    decay = np.broadcast_to(decay if decay.ndim == 4 else decay[..., None], k.shape)
    out = np.zeros(v.shape)
    for t in range(case.length):
        state = 0 * state if t in case.starts else state
        state = np.exp(decay[:, t])[..., None] * state
        u = v[:, t]
        if beta is not None:
            u = beta[:, t, :, None] * (u - np.einsum("bnmh,bnm->bnh", state, k[:, t]))
        state = state + k[:, t, :, :, None] * u[:, :, None]
        out[:, t] = np.einsum("bnmh,bnm->bnh", state, q[:, t])
    return out, state


def results(function, case: Case, given: tuple, dtype) -> dict[str, jax.Array]:
    """Result and gradients of function(q, k, v, log_decay, beta, initial, ids)."""
    *inputs, do, dfinal = (None if z is None else jnp.asarray(z) for z in given)
    inputs[:3] = (x.astype(dtype) for x in inputs[:3])
    ids = case.segment_ids()
    run = functools.partial(function, ids=None if ids is None else jnp.asarray(ids))
    (out, final), back = jax.vjp(run, *inputs)
    pulled = back((do.astype(out.dtype), dfinal.astype(final.dtype)))
    found = dict(zip(NAMES, (out, final, *pulled), strict=True))
    return {name: x for name, x in found.items() if x is not None}


def named(implementation: str):
    """`linear_attention` as a function of arrays alone."""

    def run(q, k, v, log_decay, beta, initial, ids):
        return linear_attention(
            q,
            k,
            v,
            log_decay=log_decay,
            beta=beta,
            initial=initial,
            segment_ids=ids,
            implementation=implementation,
        )

    return run


def exact(case: Case, given: tuple) -> dict[str, np.ndarray]:
    """Result and gradients by the loop over tokens in float64."""
    with jax.enable_x64(True):
        wide = tuple(None if z is None else z.astype(np.float64) for z in given)
        run = jax.jit(lambda *z: results(named("reference"), case, z, jnp.float64))
        return {name: np.asarray(x) for name, x in run(*wide).items()}


def failures(found: dict, want: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Results that miss by more than four roundings to bfloat16: (error, size), both root mean
    squares."""
    missed = {}
    for name, true in want.items():
        assert found[name].shape == true.shape
        miss = np.asarray(found[name], np.float64) - true
        error, size = (float(np.sqrt(np.mean(np.square(x)))) for x in (miss, true))
        roundings = 4 if true.size >= 64 else 8  # of a few numbers' gradients much may cancel
        if not error <= roundings * 2.0**-9 * size + 1e-6:
            missed[name] = (error, size)
    return missed
