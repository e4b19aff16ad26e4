"""A test that does not run must say why, in skips.toml; and a reason needs a test."""

import ast
import tomllib

from tests.house.tree import ROOT, dotted, parsed, python_files

LIST = ROOT / "tests/house/skips.toml"
USES = {
    "pytest.mark.skip",
    "pytest.mark.skipif",
    "pytest.mark.xfail",
    "pytest.skip",
    "pytest.xfail",
    "pytest.importorskip",
    "unittest.skip",
    "unittest.skipIf",
    "unittest.skipUnless",
}
SHORT = {name.rpartition(".")[2] for name in USES}


def uses(tree: ast.Module):
    """The place of every use: the name of the outermost function or class, or "module"."""
    for top in tree.body:
        named = isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        where = top.name if named else "module"
        for node in ast.walk(top):
            if isinstance(node, ast.Attribute) and dotted(node) in USES:
                yield where
            # `from pytest import skip` hides the use behind a plain name.
            if isinstance(node, ast.ImportFrom) and node.module in {"pytest", "unittest"}:
                yield from (where for alias in node.names if alias.name in SHORT | {"mark"})


def test_every_skip_is_listed_and_every_entry_is_used():
    entries = tomllib.loads(LIST.read_text())["skip"]
    assert all(len(entry["reason"]) > 10 for entry in entries)
    listed = {(entry["file"], entry["where"]) for entry in entries}
    found = {(path, where) for path in python_files("tests") for where in uses(parsed(path))}
    assert found - listed == set()
    assert listed - found == set()


def test_uses_are_found():
    source = """
import pytest
pytest.importorskip("x")
@pytest.mark.skipif(True, reason="")
def test_a(): ...
class TestB:
    def test_b(self): pytest.skip("no")
@pytest.mark.parametrize("a", [pytest.param(1, marks=pytest.mark.xfail)])
def test_c(a): ...
def test_d(): print("pytest.skip")
from pytest import skip
"""
    assert list(uses(ast.parse(source))) == ["module", "test_a", "TestB", "test_c", "module"]
