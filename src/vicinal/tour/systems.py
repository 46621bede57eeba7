"""The ten primary systems, one row of the tour each. An issue that builds a system gives its row a `run`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a system's row shows: a picture made just now, and one number beside its baseline.

    `picture` is a file in the folder that `run` was given, `unit` says what the number counts (`"top-1 accuracy, %"`)
    and `baseline_name` what the baseline is. `note` says what a reader must know, such as the data. Numbers are None
    where nothing was measured.
    """

    picture: Path
    number: float | None
    baseline: float | None
    unit: str
    baseline_name: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class System:
    """A published system, and the function that shows it: takes a folder for pictures, returns an `Outcome`.

    `run` imports what it needs when it is called. `is_recreation` marks systems whose code was never published.
    """

    name: str
    paper: str
    published: str
    purpose: str
    is_recreation: bool = False
    run: Callable[[Path], Outcome] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A system with its outcome and the seconds that took; both None while it is not built."""

    system: System
    outcome: Outcome | None = None
    seconds: float | None = None


def _nat(folder: Path) -> Outcome:
    from vicinal.tour.classify import show_nat

    return show_nat(folder)


def _dinat(folder: Path) -> Outcome:
    from vicinal.tour.classify import show_dinat

    return show_dinat(folder)


def _stylenat(folder: Path) -> Outcome:
    from vicinal.tour.generate import show_stylenat

    return show_stylenat(folder)


def _oneformer(folder: Path) -> Outcome:
    from vicinal.tour.segment import show_oneformer

    return show_oneformer(folder)


SYSTEMS: tuple[System, ...] = (
    System(
        name="NAT",
        paper="Neighborhood Attention Transformer",
        published="CVPR 2023",
        purpose="classify an image with a pyramid whose every token sees its nearest neighbors",
        run=_nat,
    ),
    System(
        name="DiNAT",
        paper="Dilated Neighborhood Attention Transformer",
        published="arXiv 2209.15001",
        purpose="the same, with every other layer dilated to look far",
        run=_dinat,
    ),
    System(
        name="Faster NA",
        paper="Faster Neighborhood Attention: Reducing the O(n²) Cost of Self Attention at the Threadblock Level",
        published="NeurIPS 2024",
        purpose="make the operator as cheap as its arithmetic promises",
    ),
    System(
        name="StyleNAT",
        paper="StyleNAT: Giving Each Head a New Perspective",
        published="arXiv 2211.05770",
        purpose="generate images; groups of heads look through windows of their own",
        run=_stylenat,
    ),
    System(
        name="OneFormer",
        paper="OneFormer: One Transformer to Rule Universal Image Segmentation",
        published="CVPR 2023",
        purpose="semantic, instance and panoptic segmentation from one model",
        run=_oneformer,
    ),
    System(
        name="Cosmos-Transfer1",
        paper="Cosmos-Transfer1: Conditional World Generation with Adaptive Multimodal Control",
        published="arXiv 2503.14492",
        purpose="generate video under several controls, each weighted place by place",
    ),
    System(
        name="DiSparse",
        paper="DiSparse: Disentangled Sparsification for Multitask Model Compression",
        published="CVPR 2022",
        purpose="prune a network of many tasks where all of them agree",
    ),
    System(
        name="AdaFocusV3",
        paper="AdaFocusV3: On Unified Spatial-temporal Dynamic Video Recognition",
        published="ECCV 2022",
        purpose="recognize actions from a glance and a few small cubes of the video",
        is_recreation=True,
    ),
    System(
        name="FarSight",
        paper="FarSight: A Physics-Driven Whole-Body Biometric System at Large Distance and Altitude",
        published="WACV 2024",
        purpose="match people seen from afar by face, gait and body against a gallery",
        is_recreation=True,
    ),
    System(
        name="Seg-Distilled-ID",
        paper="Distilling Facial Knowledge With Teacher-Tasks: Semantic-Segmentation-Features For Pose-Invariant "
        "Face-Recognition",
        published="arXiv 2209.01115",
        purpose="recognize faces in any pose with a small network that learned to segment them",
        is_recreation=True,
    ),
)


def run_systems(
    folder: Path,
    systems: Sequence[System] = SYSTEMS,
    *,
    begin: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Run every system that is built, one after the other; their pictures go into `folder`."""
    rows = []
    for system in systems:
        if system.run is None:
            rows.append(Row(system))
            continue
        begin(f"showing {system.name}")
        start = time.perf_counter()
        outcome = system.run(folder)
        rows.append(Row(system, outcome, time.perf_counter() - start))
    return rows
