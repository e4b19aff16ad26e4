"""The picture of the losses."""

import numpy as np

from jaxllm.train.plot import draw_losses, smooth


def test_smooth_starts_at_the_first_value_and_follows():
    assert np.allclose(smooth(np.full(50, 3.0), 10.0), 3.0)
    stepped = smooth(np.concatenate([np.zeros(100), np.ones(100)]), 10.0)
    assert stepped[0] == 0 and stepped[99] == 0
    # The weight of the first 100 is negligible: 1 - e^(-n / span) of the last n.
    assert np.isclose(stepped[109], 1 - np.exp(-1), atol=1e-4)


def test_a_picture(tmp_path):
    rows = [{"resumed_from": 3}, {"step": 1, "loss": None, "val_loss": None}]
    rows += [{"step": s, "loss": 3 - s / 10_000} for s in range(2, 9000)]
    rows += [{"step": 9000, "loss": float("nan"), "val_loss": 2.0}]
    path = tmp_path / "loss.png"
    assert draw_losses(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_nothing_to_draw(tmp_path):
    assert not draw_losses([{"resumed_from": 3}, {"step": 1, "loss": None}], tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []
