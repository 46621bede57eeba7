"""Encoders of transformers under patterns: a window over everything is the dense model, others are masked attention."""

from __future__ import annotations

import pytest
import torch

import vicinal
from vicinal import Bounds, Full, Near, Same, Window, heads, union

pytest.importorskip("transformers")

import transformers

from vicinal.adapters.transformers import encoder, number_layers, register_attention

from .encoders import MODELS, answer, build, call, on, register_dense, sees

every_model = pytest.mark.parametrize("name", MODELS)


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
    with pytest.raises(ValueError, match=r"45 on the grid, but no grid was given, and none can be guessed; give grid="):
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


def test_shared_key_heads_and_other_ranks_work():
    register_attention("ours", Near(3), num_prefix_tokens=2)
    query, key = torch.randn(2, 4, 2 + 24, 8), torch.randn(2, 2, 2 + 24, 8)
    out, weights = call(query=query, key=key, grid=(2, 3, 4), output_attentions=True, scaling=0.3)
    shared = key.repeat_interleave(2, 1)
    scores = (query @ shared.transpose(2, 3) * 0.3).masked_fill(~sees(Near(3), (2, 3, 4), 2, 4), -torch.inf)
    torch.testing.assert_close(weights, scores.softmax(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, (scores.softmax(-1) @ shared).transpose(1, 2), rtol=1e-5, atol=1e-5)


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
