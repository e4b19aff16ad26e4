"""Policy: how a model runs. Static under jit; nothing in it changes what the model is."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxllm.core.config import require
from jaxllm.core.precision import DtypeName, dtype_of
from jaxllm.core.sharding import DEFAULT_RULES, Rules

__all__ = [
    "AttentionKind",
    "Codes",
    "DecodeKind",
    "ExpertsKind",
    "Layout",
    "Matrices",
    "Policy",
    "Remat",
    "ScanKind",
]

Layout = Literal["scan", "unrolled", "runs"]
Matrices = Literal["canonical", "in_out", "out_in"]
Codes = Literal["values", "planes", "operand"]
Remat = Literal["none", "save_dots", "save_attention", "offload", "full"]
AttentionKind = Literal[
    "auto", "reference", "cudnn", "mosaic_gpu", "mosaic_gpu_deterministic", "mosaic_tpu"
]
LatentKind = Literal["auto", "plain", "absorbed"]
ScanKind = Literal["auto", "reference", "chunked", "mosaic_gpu", "mosaic_tpu"]
DecodeKind = Literal["auto", "plain", "fused", "chained"]
ExpertsKind = Literal["auto", "blocked", "ragged_dot", "mosaic_gpu", "mosaic_tpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Dtypes, implementations, layout and taps of a run.

    Attributes:
      param_dtype: dtype of stored parameters.
      compute_dtype: dtype of activations and matmul inputs.
      logit_dtype: dtype of logits.
      attention: implementation of softmax attention; `auto` chooses and says what it took. With
        heads of 128 the gradients of `mosaic_gpu` differ between runs in their last bits, those of
        `mosaic_gpu_deterministic` do not.
      scan: implementation of recurrences (state space, linear attention): token by token
        (`reference`), in chunks (`chunked`), or by our kernels for Hopper GPUs and TPUs
        (`mosaic_gpu`, `mosaic_tpu`).
      experts: implementation of the products of experts: block by block of rows (`blocked`, for
        CPUs), XLA's own (`ragged_dot`), or our kernels for Hopper GPUs and TPUs (`mosaic_gpu`,
        `mosaic_tpu`).
      decode: how a step of few tokens runs: op by op (`plain`), norms, products, activations and
        residuals together in our kernel for Hopper GPUs where it serves (`fused`), or as many
        products of layers as can be in one (`chained`); weights in bfloat16 or int4. Up to four
        tokens `auto` takes chains of bfloat16 and single products of int4.
      remat: what a backward pass recomputes inside a layer: nothing (`none`), all but the results
        of matrix products and of attention (`save_dots`), all but those of attention
        (`save_attention`), as `save_dots` with what is kept held in the host's memory (`offload`),
        everything (`full`).
      layout: `scan` keeps the canonical stacks, `unrolled` one array a layer, `runs` stacks
        neighbours with equal leaf types.
      fused: query/key/value and gate/up as one matrix each.
      matrices: how matrices are held. `canonical` as the spec says; `in_out` also a tied
        embedding, as [D, V]; `out_in` as [out, in]. A product of one row reads the one or the
        other up to twice as fast, by device.
      codes: how quantized values are held: in jax's own types, four bits as planes of nibbles in
        bytes, which a CPU unpacks five times faster, or with inputs in the order in which our
        kernel for Hopper finds them in its registers (`operand`).
      latent: how latent attention reads what it remembers: keys and values `plain` for all heads,
        `absorbed` into queries and outputs, or by the number of new tokens (`auto`).
      expert_capacity: an expert takes at most this times its even share of a device's tokens, and
        the others go without it; None drops nothing.
      dropout: rate on embeddings and residual updates, active when the step carries a key.
      taps: paths (`layers.3.mlp.down`, or `gram:layers.3.mlp.down`) whose inputs, or running Gram
        matrices of inputs, come back in `aux.taps`.
      rules: logical axis -> mesh axes.
      gradient_rules: the same for gradients of parameters; None lets the compiler choose.
    """

    param_dtype: DtypeName = "float32"
    compute_dtype: DtypeName = "float32"
    logit_dtype: DtypeName = "float32"
    attention: AttentionKind = "auto"
    scan: ScanKind = "auto"
    experts: ExpertsKind = "auto"
    decode: DecodeKind = "auto"
    remat: Remat = "none"
    layout: Layout = "scan"
    fused: bool = False
    matrices: Matrices = "canonical"
    codes: Codes = "values"
    latent: LatentKind = "auto"
    expert_capacity: float | None = None
    dropout: float = 0.0
    taps: frozenset[str] = frozenset()
    rules: Rules = DEFAULT_RULES
    gradient_rules: Rules | None = None

    def __post_init__(self) -> None:
        for name in (self.param_dtype, self.compute_dtype, self.logit_dtype):
            dtype_of(name)
        require(
            self.expert_capacity is None or self.expert_capacity > 0,
            f"expert_capacity is positive, found {self.expert_capacity}",
        )
        require(0 <= self.dropout < 1, f"dropout is in [0, 1), found {self.dropout}")
        require(
            not (self.taps and self.fused),
            "taps need the projections apart: set fused=False",
        )
