"""`vicinal segment`: what is where in pictures and videos, as overlays, masks and JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vicinal.cli.terminal import console
from vicinal.data.dataset import DataMissing, Image
from vicinal.data.picture import SUFFIXES, pillow, read_picture
from vicinal.data.video import VIDEO_SUFFIXES, Video, Writer
from vicinal.recipes.shipped import FOLDER, SEGMENTER
from vicinal.tasks.export import described, number_colors, rle
from vicinal.tasks.overlay import overlay
from vicinal.training import segmenter as trained
from vicinal.training.segmenter import Found, Segmenter


def run(options: argparse.Namespace) -> None:
    """Answer the command."""
    model = model_of(options)
    out = folder(options.out)
    places = found_places(options.places, out)
    answers, faults = [], []
    with progress(len(places), options.json) as advance:
        for name, path in places:
            written = segment_video if path.suffix.lower() in VIDEO_SUFFIXES else segment_picture
            try:
                answers.append(written(model, path, out / name, options))
            except DataMissing as error:  # one that is broken does not cost the answers of the others
                faults.append(str(error))
            advance()
    (out / "segments.json").write_text(json.dumps(answers, indent=2), "utf-8")
    if options.json:
        print(json.dumps(answers, indent=2))
    else:
        words = console()
        for answer in answers:
            words.print(f"{answer['file']}: {told(answer)}", soft_wrap=True)
        if answers:
            words.print(f"overlays, masks and segments.json are in {out}", soft_wrap=True)
    if faults:
        raise DataMissing("; ".join(faults))


def folder(place: str) -> Path:
    """The folder that files go to, made where it is not there."""
    out = Path(place)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--out must be a folder, but {place} is, or is in, a file") from None
    return out


def model_of(options: argparse.Namespace) -> Segmenter:
    """The model that was asked for: that of the library, of a run, or a published one by its name."""
    if options.model is None and options.names is not None:
        raise ValueError("--names is for published weights, whose layout --model names; others have names of their own")
    if options.model is not None:
        if options.weights is None:
            raise ValueError("--model names the layout of published weights: say which by --weights FILE")
        names, things = class_names(Path(options.names)) if options.names else ((), ())
        model = trained.load_published(options.model, options.weights, names, things)
    else:
        model = trained.load_segmenter(
            FOLDER / f"{SEGMENTER}.safetensors" if options.weights is None else options.weights
        )
    return model if options.score is None else trained.with_least_score(model, options.score)


def class_names(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    r"""Names of classes, one a line, and those of things, whose lines begin with a star.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
    ...     _ = file.write("wall\n* bed\n")
    ...     file.flush()
    ...     class_names(Path(file.name))
    (('wall', 'bed'), ('bed',))
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path} with names of classes")
    lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    names = tuple(line.removeprefix("*").strip() for line in lines)
    return names, tuple(line.removeprefix("*").strip() for line in lines if line.startswith("*"))


def found_places(places: list[str], out: Path) -> list[tuple[str, Path]]:
    """Pictures and videos, in files and folders, each with a name for what is written about it.

    What an earlier call left in a folder `out` inside a place is not taken for its pictures.
    """
    paths: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            known = (*SUFFIXES, *VIDEO_SUFFIXES)
            inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in known)
            if out.resolve() != place.resolve():
                inside = [path for path in inside if out.resolve() not in path.resolve().parents]
            if not inside:
                raise ValueError(f"{place} holds no picture and no video ({', '.join(known)})")
            paths += inside
        elif place.exists():
            paths.append(place)
        else:
            raise ValueError(f"there is no picture, folder or video {place}")
    names: dict[str, Path] = {}
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names[name] = path
    return list(names.items())


def segment_picture(model: Segmenter, path: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write `OUT.overlay.png`, `OUT.masks.png` and, of instances, `OUT.coco.json`; returns what JSON says."""
    picture = read_picture(path, 3)
    begin = time.perf_counter()
    found = _segment(model, picture, options)
    seconds = time.perf_counter() - begin
    files = {"overlay": f"{out.name}.overlay.png", "masks": f"{out.name}.masks.png"}
    module = pillow()
    module.fromarray(overlay(picture, found.segments, model.info)).save(out.with_name(files["overlay"]))
    module.fromarray(mask_picture(found, options.task)).save(out.with_name(files["masks"]))
    answer = {
        "file": str(path),
        "task": options.task,
        "height": picture.shape[0],
        "width": picture.shape[1],
        "milliseconds": round(1000 * seconds, 1),
        "segments": described(found.masks, found.labels, found.scores, model.info),
    }
    if options.task == "instance":
        files["coco"] = f"{out.name}.coco.json"
        coded = [
            {"category_id": one["category_id"], "bbox": one["bbox"], "score": one["score"], "segmentation": rle(mask)}
            for one, mask in zip(answer["segments"], found.masks, strict=True)
        ]
        out.with_name(files["coco"]).write_text(json.dumps(coded), "utf-8")
    return {**answer, "files": files}


def _segment(model: Segmenter, picture: Image, options: argparse.Namespace) -> Found:
    return trained.segment(
        model, picture, options.task, size=options.size, scales=tuple(options.scales), flip=options.flip
    )


def mask_picture(found: Found, task: str) -> Image:
    """Numbers of segments as COCO's colors; of the semantic task classes as gray, 255 for void."""
    numbers = found.segments.numbers.numpy()
    if task != "semantic":
        return number_colors(numbers)
    classes = np.array([255, *found.labels], np.int64)
    return classes[numbers].astype(np.uint8)


def segment_video(model: Segmenter, path: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write `OUT.overlay.mp4` (or `.gif`) and `OUT.frames.json`; returns what JSON says."""
    video = Video(path)
    target = out.with_name(f"{out.name}.overlay{'.gif' if video.is_animation else '.mp4'}")
    frames = []
    with progress(video.frames, options.json, path.name) as advance, Writer(target, video.rate) as writer:
        for frame in video:
            found = _segment(model, frame, options)
            writer.add(overlay(frame, found.segments, model.info))
            frames.append(described(found.masks, found.labels, found.scores, model.info))
            advance()
    listed = out.with_name(f"{out.name}.frames.json")
    listed.write_text(json.dumps(frames), "utf-8")
    files = {"overlay": target.name, "frames": listed.name}
    return {"file": str(path), "task": options.task, "frames": len(frames), "rate": video.rate, "files": files}


def told(answer: dict[str, Any]) -> str:
    """A picture's segments in words, the largest first.

    >>> told({"task": "panoptic", "segments": [], "milliseconds": 3.0})
    'nothing found (3.0 ms)'
    """
    if "frames" in answer:
        return f"{answer['frames']} frames"
    largest = sorted(answer["segments"], key=lambda one: -one["area"])
    words = ", ".join(one["category"] + (f" {one['score']:.0%}" if "score" in one else "") for one in largest)
    return f"{words or 'nothing found'} ({answer['milliseconds']} ms)"


@contextmanager
def progress(total: int, is_quiet: bool, words: str = "") -> Iterator[Any]:
    """A bar on a terminal's standard error, where there is more than one thing to do; yields what advances it."""
    shown = console(stderr=True)
    if is_quiet or total == 1 or not shown.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shown, transient=True) as bar:
        task = bar.add_task(words or "segmenting", total=total or None)
        yield lambda: bar.advance(task)
