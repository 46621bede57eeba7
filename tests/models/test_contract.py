"""What every registered model keeps to, in small sizes: the suite that a new family has to pass."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import nn

from vicinal.layers.pyramid import Features, Pyramid
from vicinal.layers.tags import parameter_groups, parameter_tags
from vicinal.models import registry

NAMES = sorted(registry.classifiers())
ONE_PER_FAMILY = sorted({registry.families()[name].build: name for name in reversed(NAMES)}.values())
ODD = (75, 109)


def small(name, depth=2, **overrides):
    """The configuration of a name with few, narrow layers; every kind of layer it has stays in it."""
    config = registry.config_of(name, num_classes=5, **overrides)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    changes = {}
    if "depths" in fields:
        # two layers where layers alternate; later stages repeat what the first two have
        changes["depths"] = tuple(map(min, fields["depths"], (2, depth, 1, 1)))
    if "depth" in fields:
        changes["depth"] = depth
    if "dims" in fields:
        changes["dims"] = tuple(dim // 4 for dim in fields["dims"])
    if "dim" in fields:
        heads = fields.get("num_heads", 3)
        changes["dim"] = 8 * (heads if isinstance(heads, int) else heads[0])
    changes |= {key: fields[key] // 4 for key in ("head_dim", "stem_dim") if key in fields}
    return dataclasses.replace(config, **changes)


@cache
def built(name) -> Pyramid:
    torch.manual_seed(0)
    return registry.families()[name].build(small(name)).eval()


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_the_smallest_image_is_known(name):
    model = built(name)
    least = model.least_image
    with torch.no_grad():
        assert model(torch.randn(1, 3, least, least + 1)).isfinite().all()
        if least > 1:
            with pytest.raises(ValueError, match=rf"images must have at least {least} pixels on each side, got \(1, 3"):
                model(torch.randn(1, 3, least + 1, least - 1))
            model.least_image = 1
            try:
                with pytest.raises(RuntimeError):
                    model(torch.randn(1, 3, least - 1, least - 1))
            finally:
                model.least_image = least


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_features_at_an_odd_size(name):
    model = built(name)
    with torch.no_grad():
        logits = model(torch.randn(2, 3, *ODD))
        assert logits.shape == (2, 5)
        assert logits.isfinite().all()
        maps = model.features(torch.randn(1, 3, *ODD))
    assert len(maps) == len(model.feature_info)
    for features, info in zip(maps, model.feature_info, strict=True):
        assert features.shape[:2] == (1, info.channels)
        for length, found in zip(ODD, features.shape[2:], strict=True):
            assert found in (length // info.stride, -(-length // info.stride))
    assert all(features.isfinite().all() for features in maps)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name):
    torch.manual_seed(0)
    model = registry.families()[name].build(small(name, drop_path_rate=0.0)).train()
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_a_batch_do_not_meet(name):
    model = built(name)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:], model(images[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_can_be_swapped(name):
    config = small(name)
    build = registry.families()[name].build
    with torch.device("meta"):
        model = build(config)
        vector = build(dataclasses.replace(config, num_classes=0))
        model.head.reset(3)
        assert model(torch.empty(1, 3, 64, 64)).shape == (1, 3)
        assert vector(torch.empty(1, 3, 64, 64)).shape == vector.embed(torch.empty(1, 3, 64, 64)).shape
        images = build(dataclasses.replace(config, in_channels=5))
        assert images(torch.empty(1, 5, 64, 64)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"images must be \[batch, 3"):
        model(torch.empty(1, 4, 64, 64, device="meta"))


@pytest.mark.parametrize("name", NAMES)
def test_features_keep_what_they_need_and_nothing_else(name):
    model = built(name)
    last = len(model.stages) - 1
    features = Features(model, (last,), use_norms=True).eval()
    (found,) = features(torch.randn(1, 3, 64, 64))
    assert found.shape[1] == model.feature_info[last].channels
    assert not any(key.startswith("head") for key in features.state_dict())
    if last:
        assert len(Features(model, (0,)).stages) == 1


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_tagged(name):
    model = built(name)
    tags = parameter_tags(model)
    for key, parameter in model.named_parameters():
        if parameter.dim() <= 1 or "rpb" in key or "position" in tags[key].role:
            assert not tags[key].weight_decay, key
    groups = parameter_groups(model, 1e-3, 0.05, {"head": 10.0})
    assert sum(len(group["params"]) for group in groups) == len(tags)
    assert {group["lr"] for group in groups if group["name"].startswith("head")} == {1e-2}


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_save_and_load(name, tmp_path):
    model = built(name)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = registry.families()[name].build(small(name)).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@torch.no_grad()
def test_autocast(name):
    model = built(name)
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    exact = model(images)
    assert (logits.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_export(name):
    model = registry.families()[name].build(small(name, depth=1)).eval()
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (images,), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_compile(name):
    model = registry.families()[name].build(small(name, depth=1)).eval()
    torch.compiler.reset()  # all families share one `Pyramid.forward`, compiled a few times only
    # not 32: inductor of torch 2.13 writes beyond its memory on DaViT's last map, of one token, and Python aborts
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_a_step_of_training_lowers_the_loss(name):
    torch.manual_seed(0)
    model = registry.families()[name].build(small(name, drop_path_rate=0.0)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.05))
    images, targets = torch.randn(4, 3, 64, 64), torch.arange(4)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
