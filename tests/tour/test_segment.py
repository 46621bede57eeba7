"""The row of OneFormer, with the small weights that come with the library."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from vicinal.data.scenes import Scenes
from vicinal.recipes import shipped
from vicinal.tasks import TASKS
from vicinal.tour.segment import LARGER, SCENES, drawn, measured, show_oneformer
from vicinal.training.segmenter import load_segmenter

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

WEIGHTS = shipped.FOLDER / f"{shipped.SEGMENTER}.safetensors"


def test_the_row_shows_a_quality_beside_the_single_task_model(tmp_path):
    outcome = show_oneformer(tmp_path)
    assert outcome.picture.read_bytes()[:4] == b"\x89PNG"
    assert outcome.unit == "panoptic quality, %"
    assert outcome.baseline == 100 * shipped.SINGLE_TASK_PQ[SCENES]
    assert 0 < outcome.baseline < 100
    assert outcome.number > 5
    assert "ms a picture" in outcome.note


def test_one_model_draws_all_three_tasks():
    model = load_segmenter(WEIGHTS)
    picture = Scenes().open("test").read(1)[0][..., :3].copy()
    pictures = [drawn(model, picture, task)[0] for task in TASKS]
    assert all(one.shape == (96 * LARGER, 96 * LARGER, 3) for one in pictures)
    assert (pictures[1] != pictures[2]).any()


def test_the_shipped_weights_are_small_have_a_card_and_find_more_than_stuff_everywhere():
    assert WEIGHTS.stat().st_size <= 5_000_000
    card = WEIGHTS.with_suffix(".md").read_text()
    assert f"{sum(tensor.numel() for tensor in load_file(WEIGHTS).values()):,}" in card
    for word in ("licence", "CC BY 2.0", "scikit-image", "DejaVu"):
        assert word in card
    assert 0 < measured(load_segmenter(WEIGHTS), Scenes(test=8).open("test")) < 1
