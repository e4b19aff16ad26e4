"""SIGKILL at random moments, most of them during a save, loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def lives(folder, kills, seed):
    """What `killed.py` tells of a run."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killed", str(folder), str(kills), str(seed)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path):
    """Every life goes on from the newest checkpoint, which is no older than the last one reported
    complete; all losses are those of a run left alone, each step stands in the file once."""
    facts = lives(tmp_path, 50, 0)
    assert facts["kills"] == 50 and facts["during_saves"] >= 1
    assert facts["lives_that_resumed"] >= 25
