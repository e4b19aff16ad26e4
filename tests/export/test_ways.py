"""Kernels and meshes of a bundle: named in the manifest, never lost, never on the wrong devices."""

import json
from pathlib import Path
from typing import Any

import pytest

import jaxllm
from jaxllm.core.mesh import make_mesh
from jaxllm.errors import UnsupportedError
from jaxllm.export import ways
from jaxllm.export.bundle import export_bundle
from jaxllm.export.runtime import Bundle, BundleError
from tests.cli.toy import write_toy
from tests.export.conftest import drawn, small
from tests.infer.conftest import prompt


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A toy whose heads are as wide as kernels want them."""
    return str(write_toy(tmp_path_factory.mktemp("wide") / "toy", width=128, ffn=256))


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the programs."""
    monkeypatch.setattr("jaxllm.export.table._MODES", ("greedy",))


def variant(path: Path) -> dict[str, Any]:
    (found,) = json.loads((path / "manifest.json").read_text())["variants"]
    return found


@pytest.mark.parametrize(
    ("platform", "kernel", "call", "chip"),
    [
        ("cuda", "mosaic_gpu", "mosaic_gpu_v2", "9.0"),
        ("tpu", "mosaic_tpu", "tpu_custom_call", None),
    ],
)
@pytest.mark.usefixtures("greedy")
def test_kernels_are_listed(
    wide: str, tmp_path: Path, platform: str, kernel: str, call: str, chip: str | None
) -> None:
    options = small(platforms=(platform,), attention=kernel)
    found = variant(export_bundle(wide, tmp_path / "bundle", options))
    tokens = ["decode_attention"] if platform == "cuda" else []  # of one new token each
    assert found["implementations"] == {"attention": [*tokens, kernel]} and found["chip"] == chip
    prompt = found["programs"]["prefill-greedy-32"]
    assert call in prompt["custom_calls"]
    assert prompt["implementations"] == {"attention": [kernel]}


@pytest.mark.usefixtures("greedy")
def test_a_lost_kernel_fails(wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxllm.ops import attention

    lost = attention.IMPLEMENTATIONS | {"mosaic_gpu": attention.reference}
    monkeypatch.setattr(attention, "IMPLEMENTATIONS", lost)
    options = small(platforms=("cuda",), attention="mosaic_gpu")
    with pytest.raises(UnsupportedError, match="the kernel was lost to the reference"):
        export_bundle(wide, tmp_path / "bundle", options)
    with pytest.raises(UnsupportedError, match="experts 'mosaic_gpu'"):
        policy = jaxllm.Policy(experts="mosaic_gpu")
        ways.check_kernels(policy, "cuda", {"prefill-greedy-32": ()})


@pytest.mark.usefixtures("greedy")
def test_a_mesh(wide: str, tmp_path: Path) -> None:
    """The machine that exports needs none of the devices: the mesh is abstract."""
    options = small(meshes=("data=4,tensor=2", "tensor=2"))
    path = export_bundle(wide, tmp_path / "bundle", options)
    names = [v["name"] for v in json.loads((path / "manifest.json").read_text())["variants"]]
    assert names == ["cpu x 8 (mesh data=4,tensor=2)", "cpu x 2 (mesh tensor=2)"]
    bundle = Bundle(path)
    assert len(bundle.weights[0].devices()) == 8
    assert any(not w.is_fully_replicated for w in bundle.weights)
    mesh = make_mesh({"data": 4, "tensor": 2})
    source = jaxllm.load(wide, mesh=mesh, store=False)
    ids = prompt(9)
    wanted = source.generate(ids, max_tokens=6, raw=True).token_ids
    assert drawn(bundle, ids, 6)[: len(wanted)] == wanted


@pytest.mark.usefixtures("greedy")
def test_another_number_of_devices(wide: str, tmp_path: Path) -> None:
    path = export_bundle(wide, tmp_path / "bundle", small(meshes=("data=2,tensor=2", "tensor=2")))
    with pytest.raises(BundleError, match=r"mesh data=2,tensor=2.*mesh tensor=2.*here is cpu x 8"):
        Bundle(path)
