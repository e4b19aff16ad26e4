"""Products of a few rows: the kernel interpreted against float64, its forms, lowering, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_matmul import Link, decode_chain, decode_matmul, explain
from pallas_kernels.decode_matmul.api import tiles_for
from pallas_kernels.decode_matmul.mosaic_gpu import Part, Tiles, run
from pallas_kernels.decode_matmul.shapes import CASES
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.target import targeting
from tests.kernels.lowered import kernel_calls


def draw(rows, inputs, outputs, *, norm=False, gate=None, residual=False):
    """(x, w, options) in bfloat16."""
    random = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(random.standard_normal(s), jnp.bfloat16)  # noqa: E731
    options = {"norm": 1 + normal(inputs) / 3 if norm else None, "eps": 1e-2, "gate": gate}
    options["residual"] = normal(rows, outputs) if residual else None
    w = normal(*([2] if gate else []), outputs, inputs) * jnp.bfloat16(0.125)
    return normal(rows, inputs), w, options


def exact(x, w, *, norm, eps, gate, residual):
    """In float64, with no rounding between."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    if norm is not None:
        x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + eps) * np.asarray(norm, np.float64)
    if gate is None:
        y = x @ w.T
    else:
        a, b = x @ w[0].T, x @ w[1].T
        y = b * {"silu": a / (1 + np.exp(-a)), "relu": np.maximum(a, 0)}[gate]
    return y if residual is None else y + np.asarray(residual, np.float64)


def error(found, wanted):
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


SLOW = pytest.mark.slow
FORMS = [
    pytest.param(1, 1024, 64, {}, marks=SLOW),
    (1, 512, 64, {"norm": True, "residual": True}),
    pytest.param(3, 1536, 64, {"norm": True}, marks=SLOW),
    (2, 512, 64, {"norm": True, "gate": "silu"}),
    pytest.param(8, 512, 64, {"norm": True, "gate": "relu", "residual": True}, marks=SLOW),
]


@pytest.mark.parametrize(("rows", "inputs", "outputs", "form"), FORMS)
def test_kernel_and_reference_are_as_near_as_bfloat16_allows(rows, inputs, outputs, form):
    x, w, options = draw(rows, inputs, outputs, **form)
    wanted = exact(x, w, **options)
    with targeting("interpreter"):
        found = decode_matmul(x, w, **options, out_dtype="float32")
    plain = decode_matmul(x, w, **options, implementation="reference")
    # Of the two only the reference rounds between its steps, and its result.
    assert error(found, wanted) < (4e-3 if form.get("norm") else 1e-6)
    assert error(plain, wanted) < 1.2e-2
    assert found.dtype == jnp.float32 and plain.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("rows", "outputs", "changes"),
    [
        (2, 48, {"fold": 4}),
        (2, 24, {"woven": True}),
        pytest.param(8, 64, {"fold": 1}, marks=SLOW),
        pytest.param(8, 96, {"fold": 2, "held": False}, marks=SLOW),
        (1, 24, {"width": 128, "stages": 5, "consumers": 1}),
    ],
)
def test_other_cuts_give_the_same(rows, outputs, changes):
    x, w, options = draw(rows, 1024, outputs, residual=True)
    part = Part(inputs=1024, outputs=outputs, residual="given")
    tiles = Tiles(**({"width": 64, "stages": 2} | changes))
    with targeting("interpreter"):
        (found,) = run(
            x, (w,), (None,), options["residual"], parts=(part,), tiles=tiles, out_dtype="float32"
        )
    assert error(found, exact(x, w, **options)) < 1e-6


@SLOW
def test_a_row_does_not_depend_on_others():
    x, w, options = draw(4, 512, 64, norm=True)
    spoilt = x.at[2].set(jnp.nan)
    with targeting("interpreter"):
        found = decode_matmul(x, w, **options)
        other = decode_matmul(spoilt, w, **options)
    keep = np.array([0, 1, 3])
    np.testing.assert_array_equal(np.asarray(found)[keep], np.asarray(other)[keep])
    assert np.isnan(np.asarray(other, np.float32)[2]).all()


@pytest.mark.parametrize("name", [name for name in CASES if "8B" in name and "4 rows" not in name])
def test_lowers_for_cuda_as_one_kernel(name):
    """Shared memory fits, and nothing else is launched."""
    case = CASES[name]
    kind = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    w = kind(*([2] if case.gate else []), case.outputs, case.inputs)
    options = {"norm": kind(case.inputs)} if case.norm else {}
    options |= {"residual": kind(case.rows, case.outputs)} if case.residual else {}
    with targeting("gpu"):
        call = jax.jit(lambda x, w, o: decode_matmul(x, w, gate=case.gate, **o))
        lowered = call.trace(kind(case.rows, case.inputs), w, options)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert kernel_calls(text) == 1
    assert "stablehlo.dot" not in text and "stablehlo.reduce" not in text


def test_tiles_keep_weights_in_flight():
    for case in CASES.values():
        eps = 1e-6 if case.norm else None
        part = Part(inputs=case.inputs, outputs=case.outputs, eps=eps)
        tiles = tiles_for(case.rows, (part,))
        assert tiles.stages * tiles.width * 128 >= 65_536, case
        assert part.inputs // tiles.fold % tiles.width == 0
        assert tiles.held or eps is None


def links_of(width, inner, outputs, kind):
    """Of a layer: output, gate and up, down, and the next queries, keys and values."""
    w = {"o": (width, width), "gate": (2, inner, width), "down": (width, inner)}
    w = {name: kind(*shape) for name, shape in (w | {"qkv": (outputs, width)}).items()}
    return (
        Link(w=w["o"], residual="given"),
        Link(w=w["gate"], norm=kind(width), gate="silu"),
        Link(w=w["down"], residual=0),
        Link(w=w["qkv"], norm=kind(width)),
    )


@SLOW
def test_a_chain_is_its_links_one_by_one():
    """The interpreter makes a kernel of each, whose waiting for each other it does not know."""
    random = np.random.default_rng(1)

    def normal(*s):
        return jnp.asarray(random.standard_normal(s) / np.sqrt(s[-1]), jnp.bfloat16)

    links = links_of(512, 512, 64, normal)
    x, residual = normal(2, 512), normal(2, 512)
    plain = decode_chain(x, links, residual=residual, implementation="reference")
    wanted = exact(x, links[0].w, norm=None, eps=0, gate=None, residual=residual)
    assert error(plain[0], wanted) < 1e-2
    with targeting("interpreter"):
        found = decode_chain(x, links, residual=residual)
    assert [y.shape for y in found] == [(2, 512), (2, 512), (2, 512), (2, 64)]
    for y, other in zip(found, plain, strict=True):
        assert error(y, np.asarray(other, np.float64)) < 2e-2


@pytest.mark.parametrize("rows", [1, 4])
def test_a_chain_lowers_for_cuda_as_one_kernel(rows):
    kind = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    links = links_of(2048, 8192, 3072, kind)
    names = ("w", "norm")
    arrays = [[getattr(link, name) for name in names] for link in links]

    def call(x, residual, arrays):
        pairs = zip(links, arrays, strict=True)
        given = [dataclasses.replace(one, w=w, norm=norm) for one, (w, norm) in pairs]
        return decode_chain(x, tuple(given), residual=residual)

    with targeting("gpu"):
        traced = jax.jit(call).trace(kind(rows, 2048), kind(rows, 2048), arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert kernel_calls(text) == 1


def test_refusals():
    x, w, _ = draw(2, 512, 64)
    why = lambda x, w, **more: explain(x, (Link(w=w, **more),)).why  # noqa: E731
    with pytest.raises(UnsupportedError, match="needs a CUDA device, this is cpu; use 'auto'"):
        decode_matmul(x, w, implementation="mosaic_gpu")
    with targeting("tpu"):
        assert "XLA's own fusions" in why(x, w)
    with targeting("gpu"):
        assert "bfloat16, not float32" in why(x.astype(jnp.float32), w)
        assert "1 to 8 rows, not 9" in why(jnp.zeros((9, 512), jnp.bfloat16), w)
        odd = jnp.zeros((64, 768), jnp.bfloat16)
        assert "multiple of 512" in why(x[:, :1].repeat(768, 1), odd)
        many = jax.ShapeDtypeStruct((8, 16384), jnp.bfloat16)
        heavy = jax.ShapeDtypeStruct((64, 16384), jnp.bfloat16)
        assert "norms" in why(many, heavy, norm=jnp.zeros(16384, jnp.bfloat16))
        assert explain(many, (Link(w=heavy),)).name == "mosaic_gpu"
        assert "a chain's rows" in explain(many, (Link(w=heavy), Link(w=heavy))).why
    with pytest.raises(ShapeError, match=r"x \[M, K\] and w \[O, K\]"):
        decode_matmul(x, w[None])
    with pytest.raises(ShapeError, match=r"w \[2, O, K\]"):
        decode_matmul(x, w, gate="silu")
    with pytest.raises(ShapeError, match="as many inputs"):
        decode_matmul(x[:, :256], w)
    with pytest.raises(ShapeError, match=r"weight is \[K\]"):
        decode_matmul(x, w, norm=jnp.ones(64))
    with pytest.raises(ShapeError, match=r"residual is \[M, O\] = \(2, 64\)"):
        decode_matmul(x, w, residual=x)
    with pytest.raises(UnsupportedError, match="silu, gelu_tanh, relu, not 'swish'"):
        decode_matmul(x, jnp.stack([w, w]), gate="swish")
