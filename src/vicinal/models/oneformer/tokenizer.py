"""CLIP's byte-pair tokenizer: text to the ids that the text branch and the task's token are made of.

The vocabulary is read from the package `open_clip_torch`, which ships it; its code is not imported.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch

START, END = 49406, 49407
_MERGES = 49152 - 256 - 2
"""How many lines of the file are in use."""

_CONTRACTIONS = ("'re", "'ve", "'ll", "'s", "'t", "'m", "'d")

TASK_IDS: Mapping[str, tuple[int, ...]] = {
    "panoptic": (49406, 518, 10549, 533, 1072, 24755, 49407),
    "semantic": (49406, 518, 10549, 533, 29119, 1550, 49407),
    "instance": (49406, 518, 10549, 533, 34572, 49407),
}
"""The ids of "the task is ..." with each task, so that predicting needs no vocabulary; a test compares them."""


def task_ids(tasks: Sequence[str], length: int = 77) -> torch.Tensor:
    """The token ids of tasks, `[tasks, length]`.

    >>> task_ids(["instance"], 8).tolist()
    [[49406, 518, 10549, 533, 34572, 49407, 0, 0]]
    """
    wrong = [task for task in tasks if task not in TASK_IDS]
    if isinstance(tasks, str) or wrong:
        raise ValueError(f"task must be a list of {', '.join(TASK_IDS)}, one per image, got {tasks!r}")
    return _padded([list(TASK_IDS[task]) for task in tasks], length)


def text_prompts(names: Sequence[str], task: str, count: int) -> list[str]:
    """The `count` texts of a picture whose segments have these class names: one each, then the task's, often.

    >>> text_prompts(["cat", "sky"], "instance", 4)
    ['a photo with a cat', 'a photo with a sky', 'an instance photo', 'an instance photo']
    """
    if task not in TASK_IDS:
        raise ValueError(f"task must be one of {', '.join(TASK_IDS)}, got {task!r}")
    if len(names) > count:
        raise ValueError(f"names: {len(names)} segments are more than the {count} texts of a picture")
    filler = f"{'an' if task == 'instance' else 'a'} {task} photo"
    return [f"a photo with a {name}" for name in names] + [filler] * (count - len(names))


class Tokenizer:
    """Text to token ids, with a start and an end.

    >>> tokenizer = Tokenizer()
    >>> tokenizer(["a photo with a cat"], 8).tolist()
    [[49406, 320, 1125, 593, 320, 2368, 49407, 0]]

    Args:
        path: the vocabulary, `bpe_simple_vocab_16e6.txt.gz`; by default that of the installed `open_clip_torch`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        pairs = _read(_installed() if path is None else Path(path))
        signs = list(_byte_signs().values())
        tokens = [*signs, *(sign + "</w>" for sign in signs), *(one + two for one, two in pairs)]
        self._ids = {token: index for index, token in enumerate(tokens)}
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str], length: int = 77) -> torch.Tensor:
        """Ids `[texts, length]`, zeros after the end; a longer text is cut, and still ends."""
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list of texts, got the text {texts!r}")
        rows = [[START, *self.encode(text), END] for text in texts]
        return _padded([row if len(row) <= length else [*row[: length - 1], END] for row in rows], length)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end.

        >>> Tokenizer().encode("hello world!")
        [3306, 1002, 256]
        """
        ids = []
        for word in _words(" ".join(html.unescape(html.unescape(text)).split()).lower()):
            if word not in self._known:
                self._known[word] = [self._ids[token] for token in self._merged(word)]
            ids += self._known[word]
        return ids

    def _merged(self, word: str) -> list[str]:
        """The tokens of a word: its bytes, with the pair that is first in the file merged until none is left."""
        signs = _byte_signs()
        parts = [signs[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, _MERGES))
            if best not in self._ranks:
                break
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return parts


def _words(text: str) -> Iterator[str]:
    """Runs of letters, single digits, runs of other signs; English contractions are words of their own."""
    place = 0
    while place < len(text):
        contraction = next((end for end in _CONTRACTIONS if text.startswith(end, place)), None)
        kind = _kind(text[place])
        end = place + (1 if contraction is None else len(contraction))
        if contraction is None and kind in ("letter", "sign"):
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "space":
            yield text[place:end]
        place = end


def _kind(sign: str) -> str:
    if sign.isspace():
        return "space"
    return {"L": "letter", "N": "digit"}.get(unicodedata.category(sign)[0], "sign")


@cache
def _byte_signs() -> dict[int, str]:
    """A visible sign for every byte, in the vocabulary's order: Latin-1's own first, the others from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + index) for index, byte in enumerate(hidden)}


def _installed() -> Path:
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "text needs CLIP's vocabulary, which open_clip_torch ships and which is not installed: "
            "pip install vicinal[segment]",
            name="open_clip",
        )
    return Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = [line.split() for line, _ in zip(file, range(_MERGES + 1), strict=False)][1:]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as CLIP's vocabulary: {error}") from None
    if len(lines) != _MERGES or any(len(line) != 2 for line in lines):
        raise ValueError(f"{path} is not CLIP's vocabulary: {_MERGES} pairs are expected after its first line")
    return [(one, two) for one, two in lines]


def _padded(rows: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for row, found in zip(ids, rows, strict=True):
        if len(found) > length:
            raise ValueError(f"length must hold a text of {len(found)} tokens, got {length}")
        row[: len(found)] = torch.tensor(found)
    return ids
