"""A program with many layers alike holds each kernel once."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.target import targeting


def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


NARROW, INTS = jnp.bfloat16, jnp.int32
FORMS = {
    "flash_attention": (
        lambda q, k: flash_attention(q, k, k, causal=True, implementation="mosaic_gpu"),
        (of(NARROW, 1, 256, 4, 64), of(NARROW, 1, 256, 2, 64)),
    ),
    "grouped_matmul": (
        lambda x, w, sizes: grouped_matmul(x, w, sizes, implementation="mosaic_gpu"),
        (of(NARROW, 256, 128), of(NARROW, 4, 128, 128), of(INTS, 4)),
    ),
    "paged_attention": (
        lambda q, k, table, firsts, row: paged_attention(
            q, k, k, table, firsts, (row, row, row), implementation="mosaic_gpu"
        )[0],
        (
            of(NARROW, 4, 1, 4, 64),
            of(NARROW, 16, 64, 2, 64),
            of(INTS, 4, 8),
            of(INTS, 4),
            of(INTS, 4),
        ),
    ),
    "quantized_matmul": (
        lambda x, w, scale: quantized_matmul(x, w, scale, implementation="mosaic_gpu").astype(
            x.dtype
        ),
        (of(NARROW, 8, 256), of(jnp.int4, 256, 256), of(jnp.float32, 256, 2)),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_layers_alike_share_a_kernel(name):
    call, arguments = FORMS[name]

    def layers(count):
        def run(x, *others):
            for _ in range(count):
                x = call(x, *others)
            return x

        with targeting("gpu"):
            lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("custom_call @mosaic_gpu")

    assert layers(3) == layers(1) == 1
