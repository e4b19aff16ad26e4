"""python -m tests.kernels.compile_linear_attention_tpu v5e:2x2 [part of a case's name …]: compiles
timed cases, no TPU needed.

Result and gradients in one program; a line a case. Needs the package libtpu, and the environment of
`tests.kernels.compile_grouped_tpu`.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_attention.shapes import CASES, Shaped
from tests.kernels.tpus import chip_mesh, num_kernels


def kernels(case: Shaped, mesh: Mesh) -> int:
    """How many kernels the compiled program holds."""

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def both(q, k, v, decay, beta, ids, do):
        def run(q, k, v, decay, beta):
            how = {"log_decay": decay, "beta": beta, "segment_ids": ids}
            return linear_attention(q, k, v, **how, implementation="mosaic_tpu")[0]

        y, back = jax.vjp(run, q, k, v, decay, beta)
        return y, *back(do)

    tokens, wide = (case.batch, case.length), jnp.float32
    q, v = of(*tokens, case.key_heads, case.state), of(*tokens, case.heads, case.width)
    by_head = of(*tokens, case.heads, dtype=wide)
    decay = of(*tokens, case.heads, case.state, dtype=wide) if case.channels else by_head
    beta = by_head if case.delta else None
    arguments = (q, q, v, decay, beta, of(*tokens, dtype=jnp.int32), v)
    return num_kernels(both, arguments, mesh)


def main(topology: str, words: list[str]) -> None:
    mesh = chip_mesh(topology)
    for name, case in CASES.items():
        if words and not any(word in name for word in words):
            continue
        print(f"{name}: {kernels(case, mesh)} kernels", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
