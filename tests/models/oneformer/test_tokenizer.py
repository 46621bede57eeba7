"""CLIP's tokens against the tokenizer that ships with the vocabulary, and against ids that are known."""

from __future__ import annotations

import gzip
import importlib.util

import pytest
import torch

from vicinal.models.oneformer import tokenizer
from vicinal.models.oneformer.tokenizer import TASK_IDS, Tokenizer, task_ids, text_prompts

TEXTS = [
    "a photo with a cat",
    "The task is panoptic",
    "traffic light's pole-barrier, 1234 km/h!!",
    "they've I'm we'll DON'T x'D 'S",
    "  tabs\tand\nlines   ",
    "&lt;html&gt; &amp;amp; signs ©®™",
    "Ünïcode ß é ñ 中文字 日本語 한국어 עברית",
    "½ ² Ⅷ ٣ _under_score_ a_b",
    "emoji 🙂👍🏽 and nothing   else",
    "",
    "<|endoftext|",
]


@pytest.fixture(scope="module")
def ours():
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip_torch, which ships the vocabulary, is not installed")
    return Tokenizer()


@pytest.fixture(scope="module")
def theirs():
    found = importlib.util.find_spec("open_clip.tokenizer") if importlib.util.find_spec("open_clip") else None
    if found is None:
        pytest.skip("open_clip_torch is not installed")
    # the file alone: the package imports torchvision
    spec = importlib.util.spec_from_file_location("clip_tokenizer_alone", found.origin)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_clips(text, ours, theirs):
    assert torch.equal(ours([text]), theirs([text]))


def test_long_texts_are_cut_and_end(ours, theirs):
    text = " ".join(["segmentation"] * 100)
    assert torch.equal(ours([text]), theirs([text]))
    assert ours([text])[0, -1] == tokenizer.END


def test_known_ids(ours):
    # CLIP's own example: its first tokens are in the published notebooks
    assert ours(["hello world!"], 5).tolist() == [[49406, 3306, 1002, 256, 49407]]


@pytest.mark.parametrize("task", TASK_IDS)
def test_the_written_ids_of_tasks_are_the_tokenizers(task, ours):
    assert torch.equal(task_ids([task]), ours([f"The task is {task}"]))


def test_prompts():
    assert text_prompts([], "semantic", 2) == ["a semantic photo"] * 2
    with pytest.raises(ValueError, match="3 segments are more than the 2 texts"):
        text_prompts(["a", "b", "c"], "panoptic", 2)
    with pytest.raises(ValueError, match="task must be one of panoptic"):
        text_prompts([], "all", 2)


def test_a_wrong_vocabulary_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as CLIP's vocabulary"):
        (tmp_path / "text.gz").write_bytes(b"no gzip")
        Tokenizer(tmp_path / "text.gz")
    with gzip.open(tmp_path / "short.gz", "wt") as file:
        file.write("first\na b\n")
    with pytest.raises(ValueError, match="is not CLIP's vocabulary: 48894 pairs"):
        Tokenizer(tmp_path / "short.gz")


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install vicinal\[segment\]"):
        Tokenizer()


def test_a_text_is_not_a_list_of_texts(ours):
    with pytest.raises(ValueError, match="texts must be a list"):
        ours("a cat")
    with pytest.raises(ValueError, match="length must hold a text of 7 tokens, got 4"):
        task_ids(["panoptic"], 4)
