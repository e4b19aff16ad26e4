"""What the kernels can serve; without Pallas, which takes a third of a second to import."""

from __future__ import annotations

from pallas_kernels.target import not_hopper

__all__ = ["CODES", "unfit"]

CODES = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Dtypes of pages of 8 bits, and the largest number of each."""
_LANES = 128


def unfit(
    *,
    dtype: str,
    widths: tuple[int, int],
    page_size: int,
    platform: str,
    latent: bool = False,
    codes: bool = False,
    implementation: str = "mosaic_gpu",
) -> str | None:
    """Why a kernel cannot serve a kind of call, or None.

    Args:
      dtype: of queries, and of pages unless they are of 8 bits.
      widths: of a head's keys and values.
      page_size: tokens a page.
      platform: of `target`.
      latent: whether values are the keys' first dims.
      codes: whether pages are of 8 bits with scales.
      implementation: the kernel's name.
    """
    if implementation == "mosaic_tpu":
        facts = {"dtype": dtype, "widths": widths, "page_size": page_size, "platform": platform}
        return _unfit_tpu(**facts, latent=latent, codes=codes)
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if codes:
        if latent:
            return "it takes latent keys in the dtype of the queries, not in 8 bits"
        if dtype != "bfloat16" or page_size == 16:
            return (
                "pages of 8 bits go with queries in bfloat16 and have 32, 64 or 128 tokens, found "
                f"{dtype} and {page_size}"
            )
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {dtype}"
    if latent:
        if widths[0] % 64 or widths[0] > 576 or widths[1] % 128 or widths[1] > 512:
            return (
                "it takes shared keys of up to 576 dims, a multiple of 64, of which up to 512, a "
                f"multiple of 128, are values, not {widths[0]} and {widths[1]}"
            )
        if page_size not in (16, 32, 64):
            return f"it takes pages of 16, 32 and 64 tokens of latent keys, not {page_size}"
        return not_hopper(platform)
    if any(width % 64 or width > 256 for width in widths):
        return f"it takes heads of 64, 128, 192 and 256, not {widths[0]} and {widths[1]}"
    if page_size not in (16, 32, 64, 128):
        return f"it takes pages of 16, 32, 64 and 128 tokens, not {page_size}"
    return not_hopper(platform)


def _unfit_tpu(
    *, dtype: str, widths: tuple[int, int], page_size: int, platform: str, latent: bool, codes: bool
) -> str | None:
    """Why this kernel cannot serve a kind of call, or None; see `unfit` of the package."""
    if platform not in ("tpu", "interpreter"):
        return f"it needs a TPU, this is {platform}"
    if dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 and float32, not {dtype}"
    if latent:
        return "it has no form for latent keys"
    if codes and page_size % _LANES:
        return f"it takes pages of 8 bits of a multiple of 128 tokens, not {page_size}"
    if any(width % _LANES or width > 512 for width in widths):
        return (
            "it takes heads of a multiple of 128 up to 512 (XLA lays others out so that all pages "
            f"would be copied first), not {widths[0]} and {widths[1]}"
        )
    if page_size % 8:
        return f"it takes pages of a multiple of 8 tokens, not {page_size}"
    return None
