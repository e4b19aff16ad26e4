"""The benchmark's own arithmetic, and one run against an engine and a server."""

import asyncio
import json

import numpy as np
import pytest

from jaxllm.cli.main import main
from jaxllm.errors import ConfigError
from jaxllm.serve.bench.load import EngineTarget, Load, Record, drive
from jaxllm.serve.bench.report import Slo, summary, table, times_of
from jaxllm.serve.bench.workload import Ask, Workload, asks
from tests.serve.conftest import prompt
from tests.serve.test_http import KEY, serving


def test_lengths_and_prefixes():
    work = Workload(requests=50, input_tokens=20, output_tokens=10, spread=0.5, seed=3)
    found = asks(work)
    assert found == asks(work)
    sizes = [len(ask.prompt) for ask in found]
    assert (min(sizes), max(sizes)) == (10, 30)
    assert {5, 15} == {min(a.output_tokens for a in found), max(a.output_tokens for a in found)}
    shared = asks(Workload(kind="shared-prefix", requests=5, input_tokens=40, vocab=9))
    assert len({ask.prompt[:36] for ask in shared}) == 1
    assert len({ask.prompt[36:] for ask in shared}) > 1
    assert max(max(ask.prompt) for ask in shared) < 9
    some = asks(Workload(requests=40, input_tokens=4, long_share=0.25, long_tokens=99))
    assert 3 < sum(len(ask.prompt) == 99 for ask in some) < 20


def test_pieces_of_a_text(tmp_path):
    path = tmp_path / "text"
    path.write_text("".join(chr(97 + i % 26) for i in range(400)))
    for ask in asks(Workload(kind="text", text=path, requests=9, input_tokens=25)):
        assert isinstance(ask.prompt, str)
        assert len(ask.prompt) == 100
        assert ask.prompt in path.read_text()
    with pytest.raises(ConfigError, match="fewer than 4000"):
        asks(Workload(kind="text", text=path, input_tokens=1000))
    with pytest.raises(ConfigError, match="no readable"):
        asks(Workload(kind="text", text=tmp_path / "none"))


@pytest.mark.parametrize("wrong", [
    {"requests": 0}, {"spread": 1.5}, {"kind": "text"}, {"vocab": 1}, {"input_tokens": 0},
])  # fmt: skip
def test_a_workload_out_of_bounds(wrong):
    with pytest.raises(ConfigError):
        Workload(**wrong)


@pytest.mark.parametrize("wrong", [{}, {"rate": 1.0, "concurrency": 1}, {"rate": -1.0}])
def test_a_load_is_one_of_two(wrong):
    with pytest.raises(ConfigError):
        Load(**wrong)


def test_numbers_of_known_times():
    """Two answers with every time by hand, and one that was refused."""
    good = [
        Record(sent=1.0, stamps=[1.5, 1.6, 1.9], ended=2.0, input_tokens=10, output_tokens=3),
        Record(sent=2.0, stamps=[2.1, 2.3], ended=2.4, input_tokens=20, output_tokens=5),
    ]
    records = [*good, Record(sent=0.0, ended=9.0, error="Busy: full")]
    times = times_of(records)
    np.testing.assert_allclose(times.ttft_ms, [500, 100])
    np.testing.assert_allclose(times.tpot_ms, [200, 50])
    np.testing.assert_allclose(times.itl_ms, [100, 300, 200])
    np.testing.assert_allclose(times.e2e_ms, [1000, 400])
    found = summary(Load(rate=2.0), records, 4.0, Slo(ttft_ms=200.0, e2e_ms=900.0))
    assert (found["failed"], found["errors"]) == (1, ["Busy: full"])
    assert (found["output_tokens_per_s"], found["total_tokens_per_s"]) == (2.0, 9.5)
    assert (found["requests_per_s"], found["goodput_per_s"]) == (0.5, 0.25)
    assert found["itl_ms"]["p50"] == pytest.approx(200)
    assert "500.0" not in table([found])
    assert "300.0 / 496.0" in table([found])


def test_answers_of_one_token_have_no_gaps():
    found = summary(
        Load(concurrency=1),
        [Record(sent=0.0, stamps=[0.1], ended=0.1, output_tokens=1)],
        1.0,
        Slo(tpot_ms=1.0),
    )
    assert found["tpot_ms"] == found["itl_ms"] == dict.fromkeys(("mean", "p50", "p90", "p99"))
    assert found["goodput_per_s"] == 1.0
    assert "–" in table([found])


def test_concurrency_is_kept():
    class Counting:
        now = most = 0

        async def answer(self, ask, record):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.002)
            self.now -= 1

    target = Counting()
    records, _ = asyncio.run(drive(target, [Ask((1,), 1)] * 20, Load(concurrency=3)))
    assert (target.most, len(records)) == (3, 20)
    records, seconds = asyncio.run(drive(target, [Ask((1,), 1)] * 20, Load(rate=1000.0)))
    assert len(records) == 20
    assert seconds < 1


def test_an_engine_is_measured(engine):
    wanted = [Ask(prompt(9), 5), Ask("abc", 4)]
    records, _ = asyncio.run(drive(EngineTarget(engine), wanted, Load(concurrency=2)))
    assert [r.error for r in records] == [None, None]
    assert sorted(r.output_tokens for r in records) == [4, 5]
    assert all(len(r.stamps) == r.output_tokens for r in records)
    assert all(r.sent < r.stamps[0] < r.ended for r in records)
    records, _ = asyncio.run(drive(EngineTarget(engine), [Ask((999,), 5)], Load(concurrency=1)))
    assert "0..271" in records[0].error


def test_a_server_is_measured(engine, tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    with serving(engine) as server:
        url = f"http://127.0.0.1:{server.port}"
        command = ["bench", "serve", url, "--api-key", KEY, "--prompts", "shared-prefix"]
        command += ["--requests", "6", "--input-tokens", "40", "--output-tokens", "6"]
        command += ["--vocab", "250", "--concurrency", "1", "3", "--out", str(out)]
        assert main([*command, "--slo-ttft-ms", "60000"]) == 0
        document = json.loads(out.read_text())
        first, second = document["runs"]
        assert (first["load"], second["concurrency"]) == ("1 at once", 3)
        for run in (first, second):
            assert (run["failed"], run["input_tokens"], run["output_tokens"]) == (0, 240, 36)
            assert run["cached_tokens"] >= 5 * 36
            assert run["goodput_per_s"] == pytest.approx(run["requests_per_s"])
        assert KEY not in out.read_text()
        assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
        assert "3 at once" in capsys.readouterr().out
        assert main(["bench", "serve", url, "--api-key", "wrong", "--requests", "2"]) == 2
        assert "--api-key" in capsys.readouterr().err
        command[command.index("--vocab") + 1] = "5000"
        assert main([*command, "--warmup", "0"]) == 1
        assert "6/6" in capsys.readouterr().out
