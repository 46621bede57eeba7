"""Recipes for segmentation: small ones on made scenes, for a CPU and minutes, and the published ones, not run."""

from __future__ import annotations

from dataclasses import replace

from vicinal.data.augment import ColorJitter, Flip, Step
from vicinal.data.dataset import Source
from vicinal.data.jitter import OnColors, ScaleJitter, ShortSide
from vicinal.data.panoptic_files import Ade20k, Cityscapes, CocoPanoptic
from vicinal.data.scenes import Scenes
from vicinal.models.compact import CompactConfig
from vicinal.models.oneformer import OneFormerConfig, TextConfig
from vicinal.models.oneformer.losses import LossConfig
from vicinal.models.registry import config_of
from vicinal.recipes.full import NOT_RUN
from vicinal.tasks.joint_labels import TASKS, TaskName
from vicinal.tasks.postprocess import PUBLISHED, Rules
from vicinal.tasks.segmentation import Segmentation
from vicinal.tasks.stem import Stem
from vicinal.training.recipe import AdamW, Cosine, Loop, Poly, Recipe, Schedule, Steps

RAN = "run: see docs/segmentation.md"

BACKBONE = CompactConfig("dinat", dim=16, depths=(0, 2, 2, 2, 1), kernel_size=5, value_kernel=3, in_channels=3)
"""Maps of strides 4 to 32; every other layer of the first three is dilated to the whole map."""

SMALL = OneFormerConfig(
    BACKBONE,
    num_queries=20,
    dim=64,
    num_heads=4,
    pixel_layers=2,
    pixel_hidden_dim=128,
    query_layers=1,
    decoder_layers=4,
    hidden_dim=128,
    dropout=0.0,
    text=TextConfig(width=64, num_layers=1, vocabulary=64, context_length=16, contexts=4),
)
"""860,000 parameters without the text branch, most of them the backbone's."""

EPOCHS = 0.75
"""Of joint training; each task alone gets a third."""


def scenes_stem() -> Recipe:
    """The backbone of the small OneFormers: classes of pixels and middles of things on made scenes.

    >>> scenes_stem().task.backbone.mixer
    'dinat'
    """
    return Recipe(
        name="scenes_stem",
        status=RAN,
        data=Scenes(),
        task=Stem(BACKBONE),
        train_steps=(Flip(), OnColors(ColorJitter(0.3))),
        optimizers={"main": AdamW(learning_rate=3e-3)},
        schedule=Cosine(warmup=0.1),
        loop=Loop(
            epochs=3, batch_size=16, clip_norm=5.0, evaluate_every=0.5, threads=1, checkpoint_every=100, log_every=20
        ),
    )


def scenes_oneformer() -> Recipe:
    """A small OneFormer-DiNAT on made scenes, all three tasks at once; its backbone is that of `scenes_stem`.

    >>> scenes_oneformer().task.tasks
    ('panoptic', 'semantic', 'instance')
    """
    return Recipe(
        name="scenes_oneformer",
        status=RAN,
        data=Scenes(),
        task=Segmentation(
            SMALL,
            loss=LossConfig(num_points=512),
            rules=Rules(0.5, 0.8, 100),
            stem="runs/scenes_stem/model.safetensors",
        ),
        train_steps=(Flip(), OnColors(ColorJitter(0.3))),
        optimizers={"main": AdamW(learning_rate=1e-3)},
        schedule=Poly(power=0.9, warmup=0.05),
        loop=Loop(
            epochs=EPOCHS,
            batch_size=8,
            clip_norm=1.0,
            evaluate_every=EPOCHS,
            threads=1,
            checkpoint_every=100,
            log_every=20,
        ),
    )


def scenes_oneformer_without_text() -> Recipe:
    """The same without the text branch and its contrastive loss.

    >>> scenes_oneformer_without_text().task.model.text is None
    True
    """
    base = scenes_oneformer()
    assert isinstance(base.task, Segmentation)
    task = replace(base.task, model=replace(SMALL, text=None))
    return replace(base, name="scenes_oneformer_without_text", task=task)


def _alone(task: TaskName) -> Recipe:
    base = scenes_oneformer()
    assert isinstance(base.task, Segmentation)
    loop = replace(base.loop, epochs=EPOCHS / len(TASKS))
    return replace(base, name=f"scenes_{task}", task=replace(base.task, tasks=(task,)), loop=loop)


def scenes_panoptic() -> Recipe:
    """The same for panoptic segmentation alone, a third of the budget."""
    return _alone("panoptic")


def scenes_semantic() -> Recipe:
    """The same for semantic segmentation alone, a third of the budget."""
    return _alone("semantic")


def scenes_instance() -> Recipe:
    """The same for instance segmentation alone, a third of the budget."""
    return _alone("instance")


def _published(
    name: str, data: Source, steps: tuple[Step, ...], test: Step, schedule: Schedule, iterations: int, images: int
) -> Recipe:
    """OneFormer's training: 16 images a step, full-model clipping, a tenth of the rate for the backbone.

    The color changes of SSD are stood in for by ours, and figures of an evaluation within training are those of its
    frame, not of the original sizes.
    """
    config = config_of(name)
    assert isinstance(config, OneFormerConfig)
    rules = PUBLISHED[{"coco": "coco_panoptic"}.get(name.rpartition("_")[2], name.rpartition("_")[2])]
    return Recipe(
        name=f"{name}_training",
        status=NOT_RUN,
        data=data,
        task=Segmentation(replace(config, text=TextConfig()), rules=rules, stem="dinat_large_in22k_in1k_384_11x11.pth"),
        train_steps=steps,
        test_steps=(test,),
        optimizers={"main": AdamW(learning_rate=1e-4, weight_decay=0.05, scales={"backbone": 0.1})},
        schedule=schedule,
        loop=Loop(
            epochs=iterations / (images // 16),
            batch_size=16,
            clip_norm=0.01,
            workers=4,
            checkpoint_every=5000,
            evaluate_every=5000 / (images // 16),
            log_every=50,
        ),
    )


def oneformer_dinat_large_ade20k_training() -> Recipe:
    """OneFormer-DiNAT-L on ADE20K; published: PQ 50.5, AP 36.0, mIoU 58.3.

    >>> oneformer_dinat_large_ade20k_training().schedule
    Poly(power=0.9, warmup=0.0, start=0.001, final=0.0)
    """
    sizes = tuple(int(step * 0.1 * 640) for step in range(5, 21))
    steps = (ShortSide(sizes, 2560, 640), OnColors(ColorJitter(0.5)), Flip())
    test = ScaleJitter(896, (1.0, 1.0))
    return _published("oneformer_dinat_large_ade20k", Ade20k(), steps, test, Poly(power=0.9), 160_000, 20_210)


def oneformer_dinat_large_cityscapes_training() -> Recipe:
    """OneFormer-DiNAT-L on Cityscapes; published: PQ 67.6, AP 45.6, mIoU 83.1.

    >>> oneformer_dinat_large_cityscapes_training().train_steps[0].crop
    (512, 1024)
    """
    sizes = tuple(int(step * 0.1 * 1024) for step in range(5, 21))
    steps = (ShortSide(sizes, 4096, (512, 1024)), OnColors(ColorJitter(0.5)), Flip())
    test = ScaleJitter((1024, 2048), (1.0, 1.0))
    return _published("oneformer_dinat_large_cityscapes", Cityscapes(), steps, test, Poly(power=0.9), 90_000, 2_975)


def oneformer_dinat_large_coco_training() -> Recipe:
    """OneFormer-DiNAT-L on COCO panoptic; published: PQ 58.0, AP 49.2, mIoU 68.1.

    >>> [round(epoch, 1) for epoch in oneformer_dinat_large_coco_training().schedule.at]
    [88.7, 96.1]
    """
    epoch = 118_287 // 16
    schedule = Steps(at=(655_556 / epoch, 710_184 / epoch), warmup=10 / epoch, start=1.0)
    test = ScaleJitter(1024, (1.0, 1.0))
    steps = (Flip(), ScaleJitter(1024, (0.1, 2.0)))
    return _published("oneformer_dinat_large_coco", CocoPanoptic(), steps, test, schedule, 737_500, 118_287)


RECIPES = (
    scenes_stem,
    scenes_oneformer,
    scenes_oneformer_without_text,
    scenes_panoptic,
    scenes_semantic,
    scenes_instance,
    oneformer_dinat_large_ade20k_training,
    oneformer_dinat_large_cityscapes_training,
    oneformer_dinat_large_coco_training,
)
