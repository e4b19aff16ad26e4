"""The suite's ground rules: eight virtual CPU devices, strict promotion, warnings are errors, types
checked at run time, a cache folder of its own."""

import gc
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Where the user's own cache lies: tests with the real model look there. Workers inherit the answer.
os.environ.setdefault(
    "JAXLLM_REAL_CACHE",
    os.path.abspath(
        os.path.expanduser(
            os.environ.get("JAXLLM_CACHE")
            or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jaxllm")
        )
    ),
)
os.environ["JAXLLM_CACHE"] = tempfile.mkdtemp(prefix="jaxllm-test-cache-")
for name in ("HF_ENDPOINT", "XLA_FLAGS"):
    os.environ.pop(name, None)
if os.environ["JAX_PLATFORMS"] == "cpu" and not os.environ.get("JAXLLM_TEST_OPTIMIZED"):
    # Programs that run a few times compile in half the time without LLVM's passes, by XLA's older
    # emitters and in one piece. `scripts/test --slow` compiles them as everybody's are.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
        " --xla_cpu_parallel_codegen_split_count=1"
    )

if importlib.util.find_spec("beartype"):  # a device machine may lack it
    from jaxtyping import install_import_hook

    _hook = install_import_hook(["jaxllm", "pallas_kernels"], "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")


_MOST_MAPS = 20_000
"""Of the 65,530 that Linux gives a process: XLA takes some for each program that it compiles for a
CPU, and dies without a word when there are none left."""


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path == item.path:
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()
