"""The soak in a short form, and that its judge can say no."""

import json
import os
import subprocess
import sys

import pytest

from scripts.soak_serve import MIB, Found, judged

COUNTS = {
    "jaxllm_held_pages": 0.0, "jaxllm_running": 0.0, "jaxllm_waiting": 0.0,
    "jaxllm_compilations_after_ready_total": 0.0, "jaxllm_drawn_tokens_total": 5.0,
    "jaxllm_spilled_pages_total": 0.0, "jaxllm_restored_pages_total": 0.0,
    "jaxllm_hit_tokens_total": 0.0, "jaxllm_preemptions_total": 0.0,
}  # fmt: skip


def found(growth=0, **changes):
    """Six hundred seconds at 800 MiB, with so much growth in all."""
    sizes = [(float(t), 800 * MIB + growth * t // 600) for t in range(600)]
    return Found(rss=sizes, **changes)


def test_what_the_soak_calls_a_failure():
    assert judged(found(), COUNTS)["failed"] == []
    assert judged(found(growth=20 * MIB), COUNTS)["failed"] == []
    assert judged(found(growth=80 * MIB), COUNTS)["failed"] == ["memory"]
    assert judged(found(stuck=["slow"], wrong=["500"]), COUNTS)["failed"] == ["stuck", "answers"]
    wrong = {
        "pages": "held_pages",
        "queue": "waiting",
        "compilations": "compilations_after_ready_total",
    }
    for name, count in wrong.items():
        assert judged(found(), COUNTS | {f"jaxllm_{count}": 1.0})["failed"] == [name]


@pytest.mark.slow
def test_twenty_seconds():
    command = [sys.executable, "scripts/soak_serve.py", "--seconds", "20", "--clients", "12"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    out = json.loads(done.stdout)
    assert out["requests"]["hangs_up"] > 10
    assert out["statuses"]["200"] > 50
    assert out["spilled_pages_total"] > 0 and out["restored_pages_total"] > 0
