"""The ONNX graph gives the model's tokens in onnxruntime, and refuses what it has no nodes for."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

import jaxllm
from jaxllm.cli.main import main
from jaxllm.errors import UnsupportedError
from jaxllm.export.onnx_graph import check_spec, export_onnx
from jaxllm.zoo.pull import CATALOGUE
from tests.cli.test_cli import refused
from tests.cli.toy import write_toy
from tests.contracts.specs import LLAMA3, MLP48, SPECS, heads, model, pre
from tests.infer.conftest import prompt, quickly, save

pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

BIASED = model(
    pre("G", heads(4, 2, rope=LLAMA3, qkv_bias=True, out_bias=True), MLP48), layers="G*2"
)


def session(folder: Path) -> "runtime.InferenceSession":
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 2
    return runtime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def greedy(run: "runtime.InferenceSession", ids: list[int], count: int) -> list[int]:
    """Prefill, then one token a call, as somebody else would who reads the graph's inputs."""
    names = [x.name for x in run.get_inputs()][1:]
    shapes = {x.name: x.shape for x in run.get_inputs()}
    feeds = {n: np.zeros((1, shapes[n][1], 0, shapes[n][3]), np.float32) for n in names}
    outputs = [n.replace("past", "present") for n in names]
    found, new = [], ids
    for _ in range(count):
        out = run.run(["logits", *outputs], feeds | {"input_ids": np.array([new], np.int64)})
        new = [int(out[0][0].argmax())]
        found += new
        feeds = dict(zip(names, out[1:], strict=True))
    return found


@pytest.mark.parametrize("spec", ["tied", "biased"])
def test_greedy_tokens(spec: str, tmp_path: Path) -> None:
    if spec == "tied":
        source = write_toy(tmp_path / "toy", width=32)
    else:
        source = save(tmp_path / "toy", dataclasses.replace(BIASED, context=64))
    folder = export_onnx(str(source), tmp_path / "onnx")
    toy = quickly(jaxllm.load(source, store=False))
    ids = [i % 64 for i in prompt(11)]
    wanted = toy.generate(ids, max_tokens=12).token_ids
    assert greedy(session(folder), ids, 12)[: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("moe", "not attention and then an MLP"),
        ("dual", "not attention and then an MLP"),
        ("mqa_sandwich", r"more than x \+ f\(norm\(x\)\)"),
        ("streaming", "a causal mask"),
    ],
)
def test_other_models_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"no ONNX graph for this model: .*{reason}"):
        check_spec(SPECS[name])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, dest = str(write_toy(tmp_path / "toy")), str(tmp_path / "onnx")
    assert "leave the other options out" in refused(
        capsys, "export", source, dest, "--onnx", "--context", "64"
    )
    assert main(["export", source, dest, "--onnx"]) == 0
    assert "model.onnx" in capsys.readouterr().out
    assert {p.name for p in Path(dest).iterdir()} >= {"model.onnx", "tokenizer.json"}
    assert "exists" in refused(capsys, "export", source, dest, "--onnx")


@pytest.mark.slow
def test_the_default_models_tokens(tmp_path: Path) -> None:
    name = next(iter(CATALOGUE))
    (file,) = CATALOGUE[name].files
    path = Path(os.environ["JAXLLM_REAL_CACHE"]) / "models" / name / file.name
    if not path.exists():
        pytest.skip(f"{path} is not there: jaxllm pull {name}")
    folder = export_onnx(str(path), tmp_path / "onnx")
    source = jaxllm.load(path, dtype="float32", store=False)
    ids = source.prompt_ids("Write a long story about a lighthouse keeper and the sea.")
    wanted = source.generate(ids, max_tokens=256).token_ids
    assert greedy(session(folder), ids, len(wanted)) == wanted
    assert len(wanted) == 256
