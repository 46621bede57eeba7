"""Key sets of published OneFormers and Mask2Formers, with shapes, written down from their sources."""

from __future__ import annotations

from collections.abc import Iterator

from ..published import Entry, convolution, linear, vectors

PIXELS, HEAD = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."


def torch_attention(name: str, dim: int = 256) -> Iterator[Entry]:
    yield f"{name}.in_proj_weight", (3 * dim, dim)
    yield f"{name}.in_proj_bias", (3 * dim,)
    yield from linear(f"{name}.out_proj", dim, dim)


def normed_convolution(name: str, into: int, kernel: int) -> Iterator[Entry]:
    yield f"{name}.weight", (256, into, kernel, kernel)
    yield from vectors(f"{name}.norm", 256)


def pixel_decoder(widths: tuple[int, ...]) -> Iterator[Entry]:
    for index, width in enumerate(reversed(widths[1:])):
        yield from convolution(f"{PIXELS}input_proj.{index}.0", 256, width, 1)
        yield from vectors(f"{PIXELS}input_proj.{index}.1", 256)
    yield f"{PIXELS}transformer.level_embed", (3, 256)
    for index in range(6):
        name = f"{PIXELS}transformer.encoder.layers.{index}"
        yield from linear(f"{name}.self_attn.sampling_offsets", 192, 256)
        yield from linear(f"{name}.self_attn.attention_weights", 96, 256)
        yield from linear(f"{name}.self_attn.value_proj", 256, 256)
        yield from linear(f"{name}.self_attn.output_proj", 256, 256)
        yield from linear(f"{name}.linear1", 1024, 256)
        yield from linear(f"{name}.linear2", 256, 1024)
        yield from vectors(f"{name}.norm1", 256)
        yield from vectors(f"{name}.norm2", 256)
    yield from convolution(f"{PIXELS}mask_features", 256, 256, 1)
    yield from normed_convolution(f"{PIXELS}adapter_1", widths[0], 1)
    yield from normed_convolution(f"{PIXELS}layer_1", 256, 3)


def decoder(queries: int, classes: int) -> Iterator[Entry]:
    for index in range(9):
        yield from torch_attention(f"{HEAD}transformer_self_attention_layers.{index}.self_attn")
        yield from vectors(f"{HEAD}transformer_self_attention_layers.{index}.norm", 256)
        yield from torch_attention(f"{HEAD}transformer_cross_attention_layers.{index}.multihead_attn")
        yield from vectors(f"{HEAD}transformer_cross_attention_layers.{index}.norm", 256)
        yield from linear(f"{HEAD}transformer_ffn_layers.{index}.linear1", 2048, 256)
        yield from linear(f"{HEAD}transformer_ffn_layers.{index}.linear2", 256, 2048)
        yield from vectors(f"{HEAD}transformer_ffn_layers.{index}.norm", 256)
    yield from vectors(f"{HEAD}decoder_norm", 256)
    yield f"{HEAD}query_embed.weight", (queries, 256)
    yield f"{HEAD}level_embed.weight", (3, 256)
    yield from linear(f"{HEAD}class_embed", classes + 1, 256)
    for index in range(3):
        yield from linear(f"{HEAD}mask_embed.layers.{index}", 256, 256)
    yield "criterion.empty_weight", (classes + 1,)


def class_transformer() -> Iterator[Entry]:
    for index in range(2):
        name = f"{HEAD}class_transformer.decoder.layers.{index}"
        yield from torch_attention(f"{name}.self_attn")
        yield from torch_attention(f"{name}.multihead_attn")
        yield from linear(f"{name}.linear1", 2048, 256)
        yield from linear(f"{name}.linear2", 256, 2048)
        for norm in ("norm1", "norm2", "norm3"):
            yield from vectors(f"{name}.{norm}", 256)
    yield from vectors(f"{HEAD}class_transformer.decoder.norm", 256)
    yield from convolution(f"{HEAD}class_input_proj", 256, 256, 1)
    yield from linear("task_mlp.layers.0", 256, 77)
    yield from linear("task_mlp.layers.1", 256, 256)


def text_branch() -> Iterator[Entry]:
    yield "text_encoder.positional_embedding", (77, 256)
    yield "text_encoder.token_embedding.weight", (49408, 256)
    yield from vectors("text_encoder.ln_final", 256)
    for index in range(6):
        name = f"text_encoder.transformer.resblocks.{index}"
        yield from torch_attention(f"{name}.attn")
        yield from vectors(f"{name}.ln_1", 256)
        yield from linear(f"{name}.mlp.c_fc", 1024, 256)
        yield from linear(f"{name}.mlp.c_proj", 256, 1024)
        yield from vectors(f"{name}.ln_2", 256)
    yield from linear("text_projector.layers.0", 256, 256)
    yield from linear("text_projector.layers.1", 256, 256)
    yield "prompt_ctx.weight", (16, 256)
    yield "criterion.logit_scale", ()


def segmenter(
    backbone: Iterator[Entry], widths: tuple[int, ...], queries: int, classes: int, *, has_task: bool = True
) -> Iterator[Entry]:
    """A whole model; `backbone` is a classifier's key set, whose head and last norm it has not."""
    for name, shape in backbone:
        if not name.startswith(("norm.", "head.")):
            yield f"backbone.{name}", shape
    for level, width in enumerate(widths):
        yield from vectors(f"backbone.norm{level}", width)
    yield from pixel_decoder(widths)
    yield from decoder(queries, classes)
    if has_task:
        yield from class_transformer()
        yield from text_branch()
    else:
        yield f"{HEAD}query_feat.weight", (queries, 256)
