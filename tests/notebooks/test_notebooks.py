"""Every notebook runs from top to bottom, on little work."""

import json
import sysconfig
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LITTLE = {
    "norm_placement": {"STEPS": 2, "LAYERS": 1, "WIDTH": 32, "RATES": (1e-3,)},
}
"""What stands in for the values of the cell tagged `parameters`."""


def cells(name):
    return [
        cell
        for cell in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
        if cell["cell_type"] == "code"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text((Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    space = {}
    for cell in cells(name):
        exec(compile("".join(cell["source"]), name, "exec"), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space |= LITTLE[name] | {"DATA": str(text)}
    assert "pre-LN" in capsys.readouterr().out


def test_there_are_notebooks_without_outputs():
    assert set(NAMES) == set(LITTLE)
    assert not [cell for name in NAMES for cell in cells(name) if cell["outputs"]]
