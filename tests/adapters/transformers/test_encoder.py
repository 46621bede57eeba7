"""Encoders of transformers under patterns: a window over everything is the dense model, others are masked attention."""

from __future__ import annotations

import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch

import vicinal
from vicinal import Bounds, Full, Near, Same, Window, heads, union

pytest.importorskip("transformers")

import transformers

from vicinal.adapters.transformers import HostChanged, encoder, number_layers, register_attention

SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=48, patch_size=8
)
"""A grid of 6 x 6."""

MODELS = {
    "ViT": (1, {}),
    "Dinov2": (1, {}),
    "Dinov2WithRegisters": (4, {"num_register_tokens": 3}),
    "DINOv3ViT": (3, {"num_register_tokens": 2}),
    "DeiT": (2, {}),
    "SiglipVision": (0, {}),
    "IJepa": (0, {}),
}
"""Prefix tokens, and what the configuration says besides `SMALL`."""

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def no_names_left(monkeypatch):
    """Names registered in a test are forgotten after it."""
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))


def build(name, **changes):
    """A model with random weights, such that attention matters, on the host's dense attention."""
    own = {"mlp_ratio": 1} if name.startswith("Dinov2") else {}
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **own, **MODELS[name][1], **changes})
    model = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="eager")
    for _, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def on(model, name, pattern, **options):
    """The model on attention by a pattern."""
    register_attention(name, pattern, **options)
    model.set_attn_implementation(name)
    return model


def sees(pattern, grid, prefix, num_heads):
    """Who sees whom, `[heads, tokens, tokens]`, with prefix tokens that see and are seen by all."""
    cells = vicinal.pattern.mask(pattern, grid)
    count = 1
    for size in grid:
        count *= size
    cells = cells.reshape(-1, count, count)
    cells = cells.repeat_interleave(num_heads // len(cells), 0)
    whole = torch.ones(num_heads, prefix + count, prefix + count, dtype=torch.bool)
    whole[:, prefix:, prefix:] = cells
    return whole


def register_dense(name, allowed):
    """Dense attention with the given masks, a list with one per layer in the order of the calls."""
    masks = itertools.cycle(allowed)

    def dense(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~next(masks), -torch.inf)
        weights = scores.softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    transformers.AttentionInterface.register(name, dense)


def answer(model, images, **kwargs):
    with torch.no_grad():
        return model(images, **kwargs).last_hidden_state


@every_model
@pytest.mark.parametrize("pattern", [Full(), Near(6), Window(6), Near(99)], ids=repr)
def test_a_full_window_is_the_dense_model(name, pattern):
    model, images = build(name), torch.randn(2, 3, 48, 48)
    dense = answer(model, images)
    assert dense.shape[1] == 36 + MODELS[name][0]
    torch.testing.assert_close(answer(on(model, "ours", pattern), images), dense, rtol=1e-5, atol=1e-5)
    small = answer(on(model, "ours", Near(3)), images)
    assert (small - dense).abs().max() > 1e-2, "attention does not matter here"


PATTERNS = [
    Near(3),
    Near(3, dilation=2),
    Window(4, shift=1),
    (Near(3), Full()),
    heads(Near(3), Window(3)),
    union((Same(), Full()), (Full(), Same())),
]


@every_model
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_pattern_is_dense_attention_with_its_mask(name, pattern):
    model, images = build(name), torch.randn(2, 3, 48, 48)
    ours = answer(on(model, "ours", pattern), images)
    register_dense("dense", [sees(pattern, (6, 6), MODELS[name][0], 4)])
    model.set_attn_implementation("dense")
    torch.testing.assert_close(ours, answer(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ViT", "DINOv3ViT"])
def test_every_parameter_gets_the_gradient_of_dense_attention(name):
    model, images = build(name).train(), torch.randn(2, 3, 48, 48)
    weights = torch.randn(2, 36 + MODELS[name][0], 32)
    on(model, "ours", Near(3))
    register_dense("dense", [sees(Near(3), (6, 6), MODELS[name][0], 4)])
    grads = []
    for implementation in ("ours", "dense"):
        model.zero_grad()
        model.set_attn_implementation(implementation)
        torch.manual_seed(1)
        (model(images).last_hidden_state * weights).sum().backward()
        grads.append({key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None})
    ours, dense = grads
    assert ours.keys() == dense.keys()
    assert len(ours) > 30
    for key, grad in ours.items():
        torch.testing.assert_close(grad, dense[key], rtol=1e-4, atol=1e-4, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_images_that_are_not_square_work_with_their_grid(name):
    model, images = build(name), torch.randn(1, 3, 40, 72)
    more = {"interpolate_pos_encoding": True} if name == "ViT" else {}
    dense = answer(model, images, **more)
    on(model, "ours", Full())
    torch.testing.assert_close(answer(model, images, grid=(5, 9), **more), dense, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"45 on the grid, but no grid was given, and they are no square; give grid="):
        answer(model, images, **more)
    with pytest.raises(ValueError, match=r"but grid is \(6, 9\)"):
        answer(model, images, grid=(6, 9), **more)
    ours = answer(on(model, "ours", Near(3), grid=(5, 9)), images, **more)
    register_dense("dense", [sees(Near(3), (5, 9), MODELS[name][0], 4)])
    model.set_attn_implementation("dense")
    torch.testing.assert_close(ours, answer(model, images, **more), rtol=1e-5, atol=1e-5)


def test_the_grid_of_the_call_stands_above_the_registered_one():
    model = on(build("Dinov2"), "ours", Near(3), grid=(5, 9))
    turned = torch.randn(1, 3, 72, 40)
    ours = answer(model, turned, grid=[9, 5])
    register_dense("dense", [sees(Near(3), (9, 5), 1, 4)])
    model.set_attn_implementation("dense")
    torch.testing.assert_close(ours, answer(model, turned), rtol=1e-5, atol=1e-5)


def test_a_model_that_does_not_hand_the_grid_on_takes_the_registered_one():
    model, images = build("SiglipVision"), torch.randn(1, 3, 40, 72)
    on(model, "ours", Near(3))
    with pytest.raises(ValueError, match="to register_attention"):
        answer(model, images, interpolate_pos_encoding=True, grid=(5, 9))
    ours = answer(on(model, "ours", Near(3), grid=(5, 9)), images, interpolate_pos_encoding=True)
    register_dense("dense", [sees(Near(3), (5, 9), 0, 4)])
    model.set_attn_implementation("dense")
    torch.testing.assert_close(ours, answer(model, images, interpolate_pos_encoding=True), rtol=1e-5, atol=1e-5)


def test_the_configured_grid_need_not_be_square():
    model, images = build("DINOv3ViT", image_size=[32, 72]), torch.randn(1, 3, 32, 72)  # 4 x 9 = 6 x 6
    ours = answer(on(model, "ours", Near(3)), images)
    register_dense("dense", [sees(Near(3), (4, 9), 3, 4)])
    model.set_attn_implementation("dense")
    torch.testing.assert_close(ours, answer(model, images), rtol=1e-5, atol=1e-5)


def test_other_square_images_than_the_configured_ones_need_no_grid():
    model, images = build("Dinov2"), torch.randn(1, 3, 64, 64)
    dense = answer(model, images)
    torch.testing.assert_close(answer(on(model, "ours", Full()), images), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [[Near(3), Near(3, dilation=2)], lambda layer: Near(3, dilation=1 + layer)])
def test_layers_have_patterns_of_their_own(given):
    model, images = build("ViT"), torch.randn(1, 3, 48, 48)
    on(model, "ours", given)
    with pytest.raises(ValueError, match=r"ViTAttention has no layer_idx; call .*number_layers\(model\) first"):
        answer(model, images)
    assert number_layers(model) is model
    ours = answer(model, images)
    register_dense("dense", [sees(Near(3, dilation=step), (6, 6), 1, 4) for step in (1, 2)])
    model.set_attn_implementation("dense")
    torch.testing.assert_close(ours, answer(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_has_one_pattern_per_layer(count):
    model = number_layers(on(build("ViT"), "ours", [Near(3)] * count))
    with pytest.raises(ValueError, match=f"one entry per layer, got {count} for 2"):
        answer(model, torch.randn(1, 3, 48, 48))


@every_model
def test_layers_are_numbered(name):
    model = number_layers(build(name, num_hidden_layers=3))
    found = [module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")]
    assert found == [0, 1, 2]


def test_numbers_of_the_host_stay():
    model = build("ViT")
    attention = [module for module in model.modules() if type(module).__name__ == "ViTAttention"]
    attention[0].layer_idx = 7
    number_layers(model)
    assert [module.layer_idx for module in attention] == [7, 1]


def test_a_model_with_attention_of_its_own_is_not_numbered():
    config = transformers.Swinv2Config(embed_dim=8, depths=[1], num_heads=[2], image_size=32, window_size=4)
    with pytest.raises(ValueError, match="attention interface, Swinv2Model does not"):
        number_layers(transformers.Swinv2Model(config))


def test_the_number_of_prefix_tokens_can_be_given():
    model, images = build("ViT"), torch.randn(1, 3, 48, 48)
    dense = answer(model, images)
    ours = answer(on(model, "ours", Full(), num_prefix_tokens=7, grid=(5, 6)), images)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)
    local = answer(on(model, "ours", Near(3), num_prefix_tokens=7, grid=(5, 6)), images)
    register_dense("dense", [sees(Near(3), (5, 6), 7, 4)])
    model.set_attn_implementation("dense")
    torch.testing.assert_close(local, answer(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ViT", "DINOv3ViT", "SiglipVision"])
@pytest.mark.parametrize("pattern", [Full(), Near(3), heads(Near(3), Near(3, dilation=2))], ids=repr)
def test_attention_weights_are_those_of_dense_attention(name, pattern):
    model, images = build(name), torch.randn(2, 3, 48, 48)
    on(model, "ours", pattern)
    with torch.no_grad():
        ours = model(images, output_attentions=True)
        assert not getattr(model(images), "attentions", None)
        register_dense("dense", [sees(pattern, (6, 6), MODELS[name][0], 4)])
        model.set_attn_implementation("dense")
        dense = model(images, output_attentions=True)
    assert len(ours.attentions) == 2
    for mine, theirs in zip(ours.attentions, dense.attentions, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_weights_that_the_configuration_asks_for_come_too():
    model, images = build("ViT", output_attentions=True), torch.randn(1, 3, 48, 48)
    dense = model(images).attentions
    ours = on(model, "ours", Full())(images).attentions
    assert len(ours) == len(dense) == 2
    torch.testing.assert_close(ours[1], dense[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 37), (1, 1, 37, 37)])
def test_a_mask_is_refused(shape):
    model = on(build("ViT"), "ours", Near(3))
    with pytest.raises(ValueError, match="attention_mask must be None"):
        answer(model, torch.randn(1, 3, 48, 48), attention_mask=torch.ones(shape))


def test_dropout_is_refused_in_training_only():
    model = on(build("ViT", attention_probs_dropout_prob=0.1), "ours", Near(3))
    answer(model, torch.randn(1, 3, 48, 48))
    with pytest.raises(ValueError, match=r"dropout of attention probabilities must be 0, got 0\.1"):
        answer(model.train(), torch.randn(1, 3, 48, 48))


def test_a_windowed_model_is_refused_for_its_mask():
    config = transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=32, window_size=4)
    model = on(transformers.SwinModel(config).eval(), "ours", Near(3))
    with pytest.raises(ValueError, match="attention_mask must be None"):
        model(torch.randn(1, 3, 32, 32))


def test_a_causal_model_is_refused():
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9
    )
    model = on(transformers.LlamaModel(config).eval(), "ours", Near(3), grid=(4,), num_prefix_tokens=0)
    with pytest.raises(ValueError, match="must not want a mask of its own"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_a_host_of_another_shape_is_named(monkeypatch):
    monkeypatch.delattr(transformers.masking_utils, "bidirectional_mask_function")
    spec = importlib.util.spec_from_file_location("encoder_again", encoder.__file__)
    with pytest.raises(HostChanged, match=r"does not fit this transformers: .*bidirectional_mask_function"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def call(name="ours", *, module=None, query=None, key=None, **kwargs):
    query = torch.randn(1, 4, 9, 8) if query is None else query
    key = query if key is None else key
    attend = transformers.AttentionInterface._global_mapping[name]
    return attend(module or SimpleNamespace(), query, key, key, None, **kwargs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"is_causal": True}, "is_causal must be false"),
        ({"module": SimpleNamespace(is_causal=True)}, "is_causal must be false"),
        ({"position_bias": torch.zeros(1)}, "position_bias must be None"),
        ({"softcap": 30.0, "s_aux": 1.0}, "softcap, s_aux must be None"),
        ({"key": torch.randn(1, 4, 7, 8)}, "got 9 queries and 7 keys"),
        ({"grid": (0, 9)}, r"each at least 1, got \(0, 9\)"),
        ({"grid": (2, 4)}, r"but grid is \(2, 4\)"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_it_cannot_do_is_refused(given, message):
    register_attention("ours", Near(3), num_prefix_tokens=0)
    with pytest.raises(ValueError, match=message):
        call(**given)


def test_shared_key_heads_and_other_ranks_work():
    register_attention("ours", Near(3), num_prefix_tokens=2)
    query, key = torch.randn(2, 4, 2 + 24, 8), torch.randn(2, 2, 2 + 24, 8)
    out, weights = call(query=query, key=key, grid=(2, 3, 4), output_attentions=True, scaling=0.3)
    shared = key.repeat_interleave(2, 1)
    scores = (query @ shared.transpose(2, 3) * 0.3).masked_fill(~sees(Near(3), (2, 3, 4), 2, 4), -torch.inf)
    torch.testing.assert_close(weights, scores.softmax(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, (scores.softmax(-1) @ shared).transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["", "eager", "sdpa", "my_flash", "owner/kernel", "paged|near", 3])
def test_names_that_mean_something_are_refused(name):
    with pytest.raises(ValueError, match="name must be a word without any of eager"):
        register_attention(name, Near(3))


def test_a_name_of_somebody_else_is_refused():
    transformers.AttentionInterface.register("theirs", print)
    with pytest.raises(ValueError, match="somebody else has registered, got 'theirs'"):
        register_attention("theirs", Near(3))
    register_attention("ours", Near(3))
    register_attention("ours", Near(5))
    assert transformers.AttentionInterface._global_mapping["ours"].pattern == Near(5)


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ([], {}, "list of at least one pattern"),
        ("near", {}, "pattern"),
        ([Near(3), 7], {}, "pattern"),
        ((Near(3), Near(3)), {"grid": (4,)}, "axes|axis"),
        (vicinal.bounds(Near(3), (6, 6)), {"grid": (5, 5)}, r"this Bounds has grid \(6, 6\)"),
        (Near(3), {"grid": ()}, "one to three sizes"),
        (Near(3), {"num_prefix_tokens": -1}, "num_prefix_tokens must be 0 or more"),
    ],
)
def test_what_is_no_pattern_is_refused_when_it_is_registered(pattern, options, message):
    with pytest.raises(ValueError, match=message):
        register_attention("ours", pattern, **options)
    assert "ours" not in transformers.AttentionInterface._global_mapping


def test_tables_work_as_a_pattern():
    model, images = build("ViT"), torch.randn(1, 3, 48, 48)
    expected = answer(on(model, "ours", Near(3)), images)
    tables = vicinal.bounds(Near(3), (6, 6))
    assert isinstance(tables, Bounds)
    torch.testing.assert_close(answer(on(model, "tables", tables), images), expected)


def test_a_back_end_can_be_named():
    model, images = build("ViT"), torch.randn(1, 3, 48, 48)
    expected = answer(on(model, "ours", Near(3)), images)
    torch.testing.assert_close(answer(on(model, "oracle", Near(3), backend="reference"), images), expected)
    with pytest.raises(ValueError, match="backend"):
        answer(on(model, "wrong", Near(3), backend="abacus"), images)


def test_the_known_prefixes_are_those_tested():
    known = {getattr(transformers, f"{name}Config").model_type: prefix for name, (prefix, _) in MODELS.items()}
    for model_type, prefix in encoder.PREFIX_TOKENS.items():
        assert known[model_type] == prefix


def test_the_model_is_one_graph_for_a_compiler():
    model = number_layers(on(build("ViT"), "ours", [Near(3), Window(3)]))
    layers, tokens = model.layers, torch.randn(1, 37, 32)

    def run(tokens):
        for layer in layers:
            tokens = layer(tokens)
        return tokens

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), run(tokens))
