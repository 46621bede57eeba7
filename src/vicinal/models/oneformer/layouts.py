"""The names that the published code and transformers give the weights of a OneFormer and a Mask2Former."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from vicinal.models.layout import Layout, Rule, State, rule, split

OURS = Layout((rule("{rest}", "{rest}"),), ignored=r"^text\.")
"""Our own names; files of a training have the text branch too."""

_BRANCH = r"(^|\.)(text_encoder|text_projector|prompt_ctx|text_mapper|criterion)(\.|$)"
"""What a model without the text branch does not want of a published file."""

_HEAD, _PIXELS = "sem_seg_head.predictor.", "sem_seg_head.pixel_decoder."


def _attention(ours: str, theirs: str, proj: str = "out_proj") -> tuple[Rule, ...]:
    """Our attention as torch's own."""
    return (
        rule(f"{ours}.qkv.weight", f"{theirs}.in_proj_weight"),
        rule(f"{ours}.qkv.bias", f"{theirs}.in_proj_bias"),
        rule(f"{ours}.proj.{{rest}}", f"{theirs}.{proj}.{{rest}}"),
    )


def _split_attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Our attention as transformers has it, query, key and value apart."""
    parts = tuple(f"{theirs}.{name}_proj.{{rest}}" for name in "qkv")
    return (
        rule(f"{ours}.qkv.{{rest}}", parts, split(1, 1, 1)),
        rule(f"{ours}.proj.{{rest}}", f"{theirs}.out_proj.{{rest}}"),
    )


def _named(ours: str, theirs: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(rule(f"{ours}{one}.{{rest}}", f"{theirs}{other}.{{rest}}") for one, other in names.items())


_SAMPLING = {
    "attention.offsets": "self_attn.sampling_offsets",
    "attention.weights": "self_attn.attention_weights",
    "attention.value": "self_attn.value_proj",
    "attention.proj": "self_attn.output_proj",
}

_OFFICIAL = (
    *_named("pixel_decoder.", _PIXELS, {"inputs.{i}": "input_proj.{i}", "mask_features": "mask_features"}),
    rule("pixel_decoder.level_embed", _PIXELS + "transformer.level_embed"),
    rule("pixel_decoder.lateral.0.weight", _PIXELS + "adapter_1.weight"),
    rule("pixel_decoder.lateral.1.{rest}", _PIXELS + "adapter_1.norm.{rest}"),
    rule("pixel_decoder.smooth.0.weight", _PIXELS + "layer_1.weight"),
    rule("pixel_decoder.smooth.1.{rest}", _PIXELS + "layer_1.norm.{rest}"),
    *_named(
        "pixel_decoder.layers.{j}.",
        _PIXELS + "transformer.encoder.layers.{j}.",
        {
            **_SAMPLING,
            "norm": "norm1",
            "feed_forward.fc1": "linear1",
            "feed_forward.fc2": "linear2",
            "feed_forward.norm": "norm2",
        },
    ),
    *_named(
        "decoder.",
        _HEAD,
        {
            "class_transformer.project": "class_input_proj",
            "class_transformer.norm": "class_transformer.decoder.norm",
            "query_features": "query_feat",
            "query_positions": "query_embed",
            "level_embed": "level_embed",
            "norm": "decoder_norm",
            "classes": "class_embed",
            "masks": "mask_embed",
        },
    ),
    *_attention("decoder.layers.{j}.cross", _HEAD + "transformer_cross_attention_layers.{j}.multihead_attn"),
    *_attention("decoder.layers.{j}.own", _HEAD + "transformer_self_attention_layers.{j}.self_attn"),
    *_named(
        "decoder.layers.{j}.",
        _HEAD,
        {
            "cross_norm": "transformer_cross_attention_layers.{j}.norm",
            "own_norm": "transformer_self_attention_layers.{j}.norm",
            "feed_forward.fc1": "transformer_ffn_layers.{j}.linear1",
            "feed_forward.fc2": "transformer_ffn_layers.{j}.linear2",
            "feed_forward.norm": "transformer_ffn_layers.{j}.norm",
        },
    ),
    rule("task.{rest}", "task_mlp.{rest}"),
    rule("text.words.weight", "text_encoder.token_embedding.weight"),
    rule("text.positions", "text_encoder.positional_embedding"),
    rule("text.norm.{rest}", "text_encoder.ln_final.{rest}"),
    rule("text.project.{rest}", "text_projector.{rest}"),
    rule("text.contexts.weight", "prompt_ctx.weight"),
    rule("text.logit_scale", "criterion.logit_scale"),
    *_attention("text.layers.{j}.attention", "text_encoder.transformer.resblocks.{j}.attn"),
    *_named(
        "text.layers.{j}.",
        "text_encoder.transformer.resblocks.{j}.",
        {"norm1": "ln_1", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"},
    ),
)


def _query_transformer(theirs: str) -> tuple[Rule, ...]:
    ours = "decoder.class_transformer.layers.{j}"
    return (
        *_attention(f"{ours}.own", f"{theirs}.self_attn"),
        *_attention(f"{ours}.cross", f"{theirs}.multihead_attn"),
        *_named(
            f"{ours}.",
            f"{theirs}.",
            {
                "own_norm": "norm1",
                "cross_norm": "norm2",
                "feed_forward.fc1": "linear1",
                "feed_forward.fc2": "linear2",
                "feed_forward.norm": "norm3",
            },
        ),
    )


_THERE = "pixel_level_module.decoder."

_TRANSFORMERS_PIXELS = (
    *_named(
        "pixel_decoder.",
        _THERE,
        {
            "inputs.{i}": "input_projections.{i}",
            "mask_features": "mask_projection",
            "lateral": "adapter_1",
            "smooth": "layer_1",
        },
    ),
    rule("pixel_decoder.level_embed", _THERE + "level_embed"),
    *_named(
        "pixel_decoder.layers.{j}.",
        _THERE + "encoder.layers.{j}.",
        {
            **_SAMPLING,
            "norm": "self_attn_layer_norm",
            "feed_forward.fc1": "fc1",
            "feed_forward.fc2": "fc2",
            "feed_forward.norm": "final_layer_norm",
        },
    ),
)

_MODULE = "transformer_module."
_DECODER = _MODULE + "decoder."
_TEXT = "text_mapper.text_encoder."

_TRANSFORMERS_QUERIES = (
    rule("decoder.class_transformer.project.{rest}", _DECODER + "query_input_projection.{rest}"),
    rule("decoder.class_transformer.norm.{rest}", _DECODER + "query_transformer.decoder.norm.{rest}"),
    *_query_transformer(_DECODER + "query_transformer.decoder.layers.{j}"),
    rule("decoder.query_positions.weight", _MODULE + "queries_embedder.weight"),
    rule("decoder.level_embed.weight", _MODULE + "level_embed.weight"),
    rule("decoder.norm.{rest}", _DECODER + "decoder_norm.{rest}"),
    rule("decoder.classes.{rest}", _DECODER + "class_embed.{rest}"),
    *_named("decoder.", _DECODER, {"masks.layers.{i}": "mask_embed.layers.{i}.0"}),
    *_attention("decoder.layers.{j}.cross", _DECODER + "layers.{j}.cross_attn.multihead_attn"),
    *_split_attention("decoder.layers.{j}.own", _DECODER + "layers.{j}.self_attn.self_attn"),
    *_named(
        "decoder.layers.{j}.",
        _DECODER + "layers.{j}.",
        {
            "cross_norm": "cross_attn.norm",
            "own_norm": "self_attn.norm",
            "feed_forward.fc1": "ffn.linear1",
            "feed_forward.fc2": "ffn.linear2",
            "feed_forward.norm": "ffn.norm",
        },
    ),
    *_named("", "", {"task.layers.{i}": "task_encoder.task_mlp.layers.{i}.0"}),
    rule("text.words.weight", _TEXT + "token_embedding.weight"),
    rule("text.positions", _TEXT + "positional_embedding"),
    rule("text.norm.{rest}", _TEXT + "ln_final.{rest}"),
    *_named("", "", {"text.project.layers.{i}": "text_mapper.text_projector.layers.{i}.0"}),
    rule("text.contexts.weight", "text_mapper.prompt_ctx.weight"),
    rule("text.logit_scale", "criterion.logit_scale"),
    *_attention("text.layers.{j}.attention", _TEXT + "transformer.layers.{j}.self_attn"),
    *_named(
        "text.layers.{j}.",
        _TEXT + "transformer.layers.{j}.",
        {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    ),
)

_TRANSFORMERS_MASK2FORMER = (
    rule("decoder.query_features.weight", _MODULE + "queries_features.weight"),
    rule("decoder.query_positions.weight", _MODULE + "queries_embedder.weight"),
    rule("decoder.level_embed.weight", _MODULE + "level_embed.weight"),
    rule("decoder.norm.{rest}", _DECODER + "layernorm.{rest}"),
    rule("decoder.classes.{rest}", "class_predictor.{rest}"),
    *_named("decoder.", _DECODER, {"masks.layers.{i}": "mask_predictor.mask_embedder.{i}.0"}),
    *_attention("decoder.layers.{j}.cross", _DECODER + "layers.{j}.cross_attn"),
    *_split_attention("decoder.layers.{j}.own", _DECODER + "layers.{j}.self_attn"),
    *_named(
        "decoder.layers.{j}.",
        _DECODER + "layers.{j}.",
        {
            "cross_norm": "cross_attn_layer_norm",
            "own_norm": "self_attn_layer_norm",
            "feed_forward.fc1": "fc1",
            "feed_forward.fc2": "fc2",
            "feed_forward.norm": "final_layer_norm",
        },
    ),
)


def _under(layout: Layout, prefix: str) -> tuple[Rule, ...]:
    """The rules of a backbone's layout, for the backbone inside of a model."""
    return tuple(
        Rule(tuple(f"backbone.{name}" for name in one.ours), tuple(f"{prefix}{name}" for name in one.theirs), one.how)
        for one in layout.rules
    )


def _with_criterion(
    classes: str, derived: Callable[[Mapping[str, torch.Tensor]], State]
) -> Callable[[Mapping[str, torch.Tensor]], State]:
    def made(state: Mapping[str, torch.Tensor]) -> State:
        weight = torch.ones_like(state[classes])
        weight[-1] = 0.1
        return {**derived(state), "criterion.empty_weight": weight}

    return made


def official(backbone: Layout) -> Layout:
    """The published code's names, which are detectron2's; `backbone` is the layout of its backbones."""
    rules = (
        *_under(backbone, "backbone."),
        *_query_transformer(_HEAD + "class_transformer.decoder.layers.{j}"),
        *_OFFICIAL,
    )
    return Layout(
        rules,
        ignored=f"{backbone.ignored}|{_BRANCH}",
        derived=_with_criterion(_HEAD + "class_embed.bias", backbone.derived),
    )


def transformers(backbone: Layout, *, has_task: bool = True) -> Layout:
    """Names in transformers of a OneFormer, or of a Mask2Former."""
    queries = _TRANSFORMERS_QUERIES if has_task else _TRANSFORMERS_MASK2FORMER
    classes = _DECODER + "class_embed.bias" if has_task else "class_predictor.bias"
    return Layout(
        (*_under(backbone, "pixel_level_module.encoder."), *_TRANSFORMERS_PIXELS, *queries),
        prefix="model.",
        bare=("criterion.", "class_predictor."),
        ignored=f"{backbone.ignored}|{_BRANCH}",
        derived=_with_criterion(classes, backbone.derived),
    )


def layouts(backbone: Mapping[str, Layout], names: Sequence[str], *, has_task: bool = True) -> dict[str, Layout]:
    """All layouts of models with one kind of backbone; `names` are those transformers' files may have.

    >>> from vicinal.models import swin
    >>> list(layouts(swin.LAYOUTS, ("transformers", "hub")))
    ['published', 'transformers', 'hub', 'vicinal']
    """
    found = {"published": official(backbone["published"])}
    found |= {name: transformers(backbone[name], has_task=has_task) for name in names}
    return {**found, "vicinal": OURS}
