"""Checks that the tests of several kinds of families share."""

import pytest

from jaxllm.errors import ConfigError
from jaxllm.zoo.load import open_checkpoint
from tests.oracle.golden import TOLERANCE, copy, golden, relative
from tests.oracle.mutate import FACTOR, logits


def check_moved(model, mutate, name, what, params=None):
    """A feature flipped moves the logits far beyond the tolerance."""
    want, spec = golden(name), mutate(model.spec)
    assert spec != model.spec
    moved = relative(logits(spec, params or model.params, want.ids), want.logits)
    print(f"{name}, {what}: {moved:.1e}")
    assert moved > FACTOR * TOLERANCE


def check_named(problem, tmp_path):
    """A contradiction in a config is named, with the file.

    Args:
      problem: (golden model, changes of its config, pattern of the message).
      tmp_path: for the copy.
    """
    name, changes, expected = problem
    folder = copy(name, tmp_path, **changes)
    with pytest.raises(ConfigError, match=expected) as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(str(folder / "config.json"))
