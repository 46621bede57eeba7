"""Small OneFormers and Mask2Formers of transformers, with lively random weights, and ours with the same."""

from __future__ import annotations

from transformers import (
    ConvNextConfig,
    DinatConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    SwinConfig,
)

from vicinal.models import loading, oneformer, registry
from vicinal.models.oneformer.layouts import layouts
from vicinal.models.oneformer.swin import BACKBONES

QUERIES, CLASSES, DIM, POINTS, PIXEL_LAYERS = 9, 5, 64, 112, 2

SIZES = {
    "num_queries": QUERIES,
    "hidden_dim": DIM,
    "encoder_feedforward_dim": 48,
    "encoder_layers": PIXEL_LAYERS,
    "decoder_layers": 5,
    "num_attention_heads": 4,
    "dim_feedforward": 40,
    "train_num_points": POINTS,
    "dropout": 0.0,
    "num_labels": CLASSES,
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
TEXT = oneformer.TextConfig(width=DIM, num_layers=2, vocabulary=60, context_length=9, contexts=3, is_causal=False)


def backbone(kind):
    """transformers' configuration of a small backbone, and ours."""
    if kind == "swin":
        sizes = {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
        return SwinConfig(**sizes, drop_path_rate=0.0, out_features=STAGES), "swin_tiny", {
            "dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4, "drop_path_rate": 0.0,
            "always_partition": True,
        }  # fmt: skip
    if kind == "convnext":
        theirs = ConvNextConfig(
            hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 2, 1], drop_path_rate=0.0, out_features=STAGES
        )
        return theirs, "convnext_large", {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1), "drop_path_rate": 0.0}
    dilations = ((1, 2), (1,), (1,), (1,))
    sizes = {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "kernel_size": 3, "mlp_ratio": 2.0}
    theirs = DinatConfig(
        **sizes, dilations=[list(level) for level in dilations], drop_path_rate=0.0, out_features=STAGES
    )
    return theirs, "dinat_large", {
        "dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "kernel_size": 3, "dilations": dilations,
        "drop_path_rate": 0.0,
    }  # fmt: skip


def pair(kind, lively, *, has_task=True):
    """transformers' model and ours, with the same weights, in evaluation mode."""
    their_backbone, name, options = backbone(kind)
    if has_task:
        theirs = OneFormerForUniversalSegmentation(
            OneFormerConfig(
                backbone_config=their_backbone,
                conv_dim=DIM,
                mask_dim=DIM,
                is_training=True,
                task_seq_len=9,
                text_encoder_width=DIM,
                text_encoder_context_length=9,
                text_encoder_num_layers=2,
                text_encoder_vocab_size=60,
                text_encoder_n_ctx=3,
                **SIZES,
            )
        )
    else:
        theirs = Mask2FormerForUniversalSegmentation(
            Mask2FormerConfig(backbone_config=their_backbone, feature_size=DIM, mask_feature_size=DIM, **SIZES)
        )
    ours = oneformer.OneFormer(config(name, options, has_task=has_task)).eval()
    theirs = lively(theirs)
    layout = loading.load(ours, theirs.state_dict(), family(name, has_task))
    assert layout == "transformers"
    return theirs, ours


def config(name, options, *, has_task=True, text=TEXT):
    return oneformer.OneFormerConfig(
        name,
        options,
        QUERIES,
        CLASSES,
        task=has_task,
        text=text if has_task else None,
        dim=DIM,
        num_heads=4,
        pixel_layers=PIXEL_LAYERS,
        pixel_hidden_dim=48,
        decoder_layers=4,
        hidden_dim=40,
        dropout=0.0,
        task_length=9,
    )


def family(name, has_task=True):
    if has_task:
        return registry.families()[f"oneformer_{name}_ade20k"]
    if name.startswith("dinat"):
        return registry.families()["mask2former_dinat_large_coco_panoptic"]
    both = layouts(BACKBONES, ("transformers", "hub"), has_task=False)
    whole = registry.families()["oneformer_swin_large_ade20k"]
    return type(whole)({}, whole.build, both, kind="segmenter", classifier=whole.classifier, extra_classes=1)


__all__ = ["CLASSES", "DIM", "PIXEL_LAYERS", "POINTS", "QUERIES", "TEXT", "backbone", "config", "family", "pair"]
