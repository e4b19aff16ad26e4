"""Cases of the dual state space scan, drawn inputs, and the rule that a kernel is held to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops.ssd import Dual, dual_chunked

NAMES = ("y", "final", "dx", "ddt", "da", "db", "dc", "dinitial")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; sequences begin at `starts`, in every row alike."""

    length: int
    heads: int = 2
    groups: int = 1
    width: int = 64
    state: int = 64
    batch: int = 1
    starts: tuple[int, ...] = ()
    initial: bool = True

    def segment_ids(self) -> np.ndarray | None:
        if not self.starts:
            return None
        marks = np.zeros((self.batch, self.length), np.int32)
        marks[:, list(self.starts)] = 1
        return np.cumsum(marks, axis=1, dtype=np.int32)


CASES = {
    "chunks": Case(length=256, batch=2),
    "ragged": Case(length=200, heads=4, groups=2, state=128),
    "one token": Case(length=1, initial=False),
    "sequences": Case(length=136, starts=(1, 64, 70, 127)),
    "a sequence from the first token on": Case(length=72, starts=(0,)),
    "wide heads": Case(length=72, heads=1, width=128),
}


def arguments(case: Case, seed: int = 0) -> tuple[np.ndarray, ...]:
    """x, dt, a, b, c, initial state, and gradients of y and of the last state, in float32, rounded
    to bfloat16 where a kernel takes it so."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    def narrow(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))

    tokens = (case.batch, case.length)
    x, dy = (narrow(draw(*tokens, case.heads, case.width)) for _ in range(2))
    dt = np.log1p(np.exp(1.5 * draw(*tokens, case.heads) - 2))
    dt[:, ::7] = 0  # padding
    a = -np.exp(draw(case.heads))
    b, c = (narrow(draw(*tokens, case.groups, case.state)) for _ in range(2))
    b = narrow(b / np.sqrt(case.state))
    state = (case.batch, case.heads, case.width, case.state)
    initial, dfinal = draw(*state), draw(*state)
    return x, dt, a, b, c, initial * case.initial, dy, dfinal


def by_hand(case: Case, given: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    """Result and gradients token by token in float64, the gradients by the chain rule."""
    x, dt, a, b, c, initial, dy, dfinal = (z.astype(np.float64) for z in given)
    per = case.heads // case.groups
    wide_b, wide_c = (np.repeat(z, per, axis=2) for z in (b, c))
    decay = np.exp(dt * a)
    keep = np.ones((case.batch, case.length))
    keep[:, list(case.starts)] = 0
    before, state, y = [], initial, np.zeros(x.shape)
    for t in range(case.length):
        state = np.where(keep[:, t, None, None, None], state, 0)
        before.append(state)
        entering = np.einsum("bn,bnh,bnm->bnhm", dt[:, t], x[:, t], wide_b[:, t])
        state = decay[:, t, :, None, None] * state + entering
        y[:, t] = np.einsum("bnhm,bnm->bnh", state, wide_c[:, t])
    final, pull = state, dfinal
    dx, ddt = np.zeros(x.shape), np.zeros(dt.shape)
    db, dc = np.zeros(wide_b.shape), np.zeros(wide_b.shape)
    da = np.zeros(a.shape)
    for t in reversed(range(case.length)):
        after = decay[:, t, :, None, None] * before[t] + np.einsum(
            "bn,bnh,bnm->bnhm", dt[:, t], x[:, t], wide_b[:, t]
        )
        dc[:, t] = np.einsum("bnhm,bnh->bnm", after, dy[:, t])
        pull = pull + np.einsum("bnh,bnm->bnhm", dy[:, t], wide_c[:, t])
        dx[:, t] = dt[:, t, :, None] * np.einsum("bnhm,bnm->bnh", pull, wide_b[:, t])
        db[:, t] = dt[:, t, :, None] * np.einsum("bnhm,bnh->bnm", pull, x[:, t])
        change = decay[:, t] * np.einsum("bnhm,bnhm->bn", pull, before[t])
        ddt[:, t] = change * a + np.einsum("bnhm,bnh,bnm->bn", pull, x[:, t], wide_b[:, t])
        da += np.sum(change * dt[:, t], axis=0)
        pull = decay[:, t, :, None, None] * pull * keep[:, t, None, None, None]
    grouped = (*x.shape[:2], case.groups, per, case.state)
    db, dc = (z.reshape(grouped).sum(axis=3) for z in (db, dc))
    return dict(zip(NAMES, (y, final, dx, ddt, da, db, dc, pull), strict=True))


def results(function, case: Case, given: tuple) -> dict[str, jax.Array]:
    """Result and gradients of function(x, dt, a, b, c, initial, ids), narrow where kernels are."""
    x, dt, a, b, c, initial, dy, dfinal = given
    x, b, c, dy = (jnp.asarray(z, jnp.bfloat16) for z in (x, b, c, dy))
    ids = case.segment_ids()
    ids = None if ids is None else jnp.asarray(ids)
    inputs = (x, jnp.asarray(dt), jnp.asarray(a), b, c, jnp.asarray(initial))
    out, back = jax.vjp(lambda *z: function(*z, ids), *inputs)
    return dict(zip(NAMES, (*out, *back((dy, jnp.asarray(dfinal)))), strict=True))


def plain(x, dt, a, b, c, initial, ids):
    """The chunked form in plain jnp with narrow products."""
    starts = None
    if ids is not None:
        starts = jnp.diff(ids, axis=1, prepend=jnp.zeros_like(ids[:, :1])) != 0
    y, final = dual_chunked(Dual(x, dt, b, c, a, None), initial, starts)
    return y.astype(x.dtype), final


def failures(found: dict, usual: dict, want: dict[str, np.ndarray]) -> dict[str, tuple]:
    """Results whose error is over twice that of the plain narrow form: (ours, its)."""

    def error(got, true) -> float:
        assert got.shape == true.shape
        return float(np.sqrt(np.mean((np.asarray(got, np.float64) - true) ** 2)))

    missed = {}
    for name, true in want.items():
        mine, its = error(found[name], true), error(usual[name], true)
        size = float(np.sqrt(np.mean(true**2)))
        # A result of a few numbers may err little by chance: a rounding of it is allowed anyway.
        some = 2.0**-9 if true.size < 64 else 1e-4
        if not mine <= 2 * its + some * size + 1e-7:
            missed[name] = (mine, its, size)
    return missed
