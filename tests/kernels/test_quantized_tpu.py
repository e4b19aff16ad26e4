"""The product with packed integers on TPUs: interpreted, and compiled without one."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.target import targeting
from tests.kernels.compile_grouped_tpu import ENVIRONMENT, TYPES
from tests.kernels.compile_quantized_tpu import HELD
from tests.kernels.test_quantized_matmul import draw, exact


@pytest.mark.parametrize("options", [{"count": 3}, {"count": 20, "kind": "int8", "group": 512}])
def test_interpreted_for_a_tpu(options):
    options = dict(options)
    arguments = draw(options.pop("count"), 256, 2048, **options)
    with targeting("interpreter"):
        found = quantized_matmul(*arguments, implementation="mosaic_tpu")
    wanted = exact(*arguments)
    assert np.abs(np.asarray(found) - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the package libtpu")
@pytest.mark.parametrize("topology", TYPES)
def test_timed_cases_compile_for_a_tpu(topology):
    command = [sys.executable, "-m", "tests.kernels.compile_quantized_tpu", topology]
    env = os.environ | ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": TYPES[topology]}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("1 kernels") == len(HELD)
