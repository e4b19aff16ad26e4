"""Writes tests/zoo/bitsandbytes.npz: tensors that bitsandbytes packs, and what it unpacks of them.

  PEER/bin/python scripts/make_quantized_goldens.py

PEER is an environment with bitsandbytes and torch; the file is 60 KB.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import torch

SHAPES = {"rows": (32, 128), "cut": (128, 192)}  # scales of scales: whole rows, or rows cut in two


def main() -> None:
    """Write the file."""
    out: dict[str, np.ndarray] = {"version": np.array(bitsandbytes.__version__)}
    for name, shape in SHAPES.items():
        w = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
        for kind in ("nf4", "fp4"):
            for nested in (True, False):
                packed, state = bnb.quantize_4bit(
                    torch.from_numpy(w), blocksize=64, compress_statistics=nested, quant_type=kind
                )
                case = f"{name}/{kind}/{'double' if nested else 'single'}"
                out[f"{case}/weight"] = packed.numpy()
                for key, value in state.as_dict(packed=True).items():
                    out[f"{case}/weight.{key}"] = value.numpy()
                plain = bnb.dequantize_4bit(packed, state).numpy()
                out[f"{case}/plain"] = plain[-4:]
    np.savez_compressed(Path(__file__).parents[1] / "tests" / "zoo" / "bitsandbytes.npz", **out)


if __name__ == "__main__":
    main()
