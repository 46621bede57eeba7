"""Writing pictures and films: what is written is what was given, whole or not at all."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from vicinal.data.picture import read_picture
from vicinal.data.saving import check_film, save_film, save_png, sheet

image = pytest.importorskip("PIL.Image")


def pixels(*size):
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_comes_back_and_its_file_has_the_same_bits(tmp_path, channels):
    made = pixels(9, 7, channels)
    for name in ("a.png", "b.png"):
        save_png(made, tmp_path / name)
    assert np.array_equal(read_picture(tmp_path / "a.png", channels), made)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_full_disk_leaves_nothing_and_names_the_file(tmp_path, monkeypatch):
    def fill(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.png'"):
        save_png(pixels(4, 4, 1), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_has_its_pictures_in_rows():
    made = [np.full((4, 3, 1), number, np.uint8) for number in range(5)]
    found = sheet(made, columns=3, gap=1)
    assert found.shape == (9, 11, 1)
    for number in range(5):
        top, left = (number // 3) * 5, (number % 3) * 4
        assert (found[top : top + 4, left : left + 3] == number).all()
    assert (found[4] == 255).all()
    assert (found[:, 3] == 255).all()


@pytest.mark.parametrize(("name", "size"), [("film.gif", (8, 6, 1)), ("film.png", (9, 7, 3)), ("film.gif", (8, 8, 3))])
def test_a_film_of_pillow_has_its_frames(tmp_path, name, size):
    frames = [np.full(size, 50 * number, np.uint8) for number in range(4)]
    save_film(frames, tmp_path / name, 20)
    with image.open(tmp_path / name) as film:
        assert film.n_frames == 4
        assert film.info["loop"] == 0
        for number in range(4):
            film.seek(number)
            assert film.info["duration"] == 50
            assert np.abs(np.asarray(film.convert("L"), np.int64) - 50 * number).max() <= 2


@pytest.mark.parametrize("size", [(64, 48, 3), (65, 47, 1)])
def test_a_film_of_pyav_has_its_frames(tmp_path, size):
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install vicinal[video]")
    frames = [np.full(size, 20 + 40 * number, np.uint8) for number in range(5)]
    save_film(frames, tmp_path / "film.mp4", 24)
    with av.open(str(tmp_path / "film.mp4")) as film:
        shown = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 24
    assert len(shown) == 5
    for number, frame in enumerate(shown):
        assert frame.shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
        assert abs(frame.mean() - (20 + 40 * number)) < 4


def test_without_pyav_mp4_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"PyAV: pip install vicinal\[video\], or let the film end in \.gif"):
        check_film(Path("film.mp4"))
    check_film(Path("film.gif"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda folder: save_film([pixels(4, 4, 1)], folder / "film.avi"), r"must end in \.mp4, \.gif, \.png"),
        (lambda folder: save_film([pixels(4, 4, 1)], folder / "film.gif", 0), "frames_per_second"),
        (lambda folder: save_film([], folder / "film.gif"), "needs frames"),
        (lambda folder: save_png(pixels(4, 4), folder / "a.png"), "pixels must be uint8"),
        (lambda folder: save_png(np.zeros((4, 4, 3)), folder / "a.png"), "pixels must be uint8"),
        (lambda folder: sheet([], 3), "needs pictures and columns"),
    ],
)
def test_wrong_input_is_refused(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong(tmp_path)
    assert list(tmp_path.iterdir()) == []
