"""`qlora_rs.train.curve`: a PNG that shows something, and replaces an earlier one only when it is whole."""

from __future__ import annotations

import pytest

from qlora_rs.train.curve import _running_mean, draw_curve


def entries(steps: int) -> list[dict[str, float]]:
    drawn = [{"step": number, "loss": 3.0 - 0.01 * number} for number in range(1, steps + 1)]
    return [{"step": 0, "eval_loss": 3.1}, *drawn, {"step": steps, "eval_loss": 2.5}]


@pytest.mark.parametrize("steps", [0, 1, 2, 39, 300])
def test_a_picture_of_a_fair_size_opens(tmp_path, steps):
    from matplotlib.image import imread

    path = tmp_path / "loss.png"
    draw_curve(entries(steps), path, "tiny")
    picture = imread(path)
    height, width = picture.shape[:2]
    assert 400 <= height <= 1200
    assert 700 <= width <= 2000
    assert picture[..., :3].min() < 0.3  # not blank
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_an_earlier_picture_stays_where_the_new_one_fails(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "loss.png"
    path.write_bytes(b"earlier")

    def fail(self: Figure, file: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        draw_curve(entries(3), path, "tiny")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_the_running_mean_is_of_the_last_values():
    assert _running_mean([4.0, 2.0, 0.0, 10.0], 2) == [4.0, 3.0, 1.0, 5.0]
