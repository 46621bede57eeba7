"""Swin against transformers and timm, and its published layout."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vicinal.models import dinat_s, isotropic, swin
from vicinal.pattern import Full, Near

from .parity import assert_close, assert_gradients_close, take_over

SMALL = swin.SwinConfig(16, (2, 2, 2), (1, 2, 4), 0.0, num_classes=10)


def transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=112, embed_dim=16, depths=[2, 2, 2], num_heads=[1, 2, 4], num_labels=10, drop_path_rate=0.0
    )
    return transformers.SwinForImageClassification(config)


@pytest.mark.parametrize(
    "size", [(112, 112), (112, 168), (110, 150), (121, 130), (224, 116)], ids=lambda size: f"{size[0]}x{size[1]}"
)
@torch.no_grad()
def test_equals_transformers(size, lively):
    theirs, ours = lively(transformers_model()), swin.build(SMALL).eval()
    take_over(swin.LAYOUTS["transformers"], ours, theirs)
    images = torch.randn(2, 3, *size)
    assert_close(ours(images), theirs(images).logits)


def test_gradients_equal_those_of_transformers(lively):
    theirs, ours = lively(transformers_model()), swin.build(SMALL).eval()
    take_over(swin.LAYOUTS["transformers"], ours, theirs)
    assert_gradients_close(ours, theirs, torch.randn(1, 3, 110, 150))


@torch.no_grad()
def test_without_padding_it_differs_where_windows_do_not_divide(lively):
    padded = lively(swin.build(SMALL))
    plain = swin.build(dataclasses.replace(SMALL, pad_mode="none")).eval()
    plain.load_state_dict(padded.state_dict())
    images = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(plain(images), padded(images))
    images = torch.randn(1, 3, 110, 150)
    assert (plain(images) - padded(images)).abs().max() > 1e-3


@torch.no_grad()
def test_equals_timm_where_windows_divide(lively):
    timm = pytest.importorskip("timm")
    theirs = lively(
        timm.models.swin_transformer.SwinTransformer(
            img_size=112, embed_dim=16, depths=(2, 2, 2), num_heads=(1, 2, 4), window_size=7, num_classes=10
        )
    )
    ours = swin.build(SMALL).eval()
    take_over(swin.LAYOUTS["timm"], ours, theirs)
    images = torch.randn(2, 3, 112, 112)
    assert_close(ours(images), theirs(images))


def test_index_buffer_is_the_published_one():
    timm = pytest.importorskip("timm")
    index = swin.position_index(torch.zeros(49, 1))
    assert torch.equal(index, timm.models.swin_transformer.get_relative_position_index(4, 4))


@torch.no_grad()
def test_dinat_s_is_swin_where_every_window_is_the_map(lively):
    """At 28 pixels no map is longer than 7: a neighborhood and a window are both all of it, under one bias."""
    windows = lively(swin.build(dataclasses.replace(SMALL, pad_mode="none")))
    near = dinat_s.DinatSConfig(16, (2, 2, 2), (1, 2, 4), 0.0, ((1,),) * 3, pad_mode="none", num_classes=10)
    neighborhoods = dinat_s.build(near).eval()
    neighborhoods.load_state_dict(windows.state_dict(), strict=True)
    images = torch.randn(2, 3, 28, 28)
    assert_close(neighborhoods(images), windows(images))
    larger = torch.randn(1, 3, 56, 56)
    assert (neighborhoods(larger) - windows(larger)).abs().max() > 1e-3


@torch.no_grad()
def test_vitrpb_is_isotropic_nat_where_the_kernel_is_the_map(lively):
    full = isotropic.IsotropicConfig(16, 2, 0.0, (Full(),), depth=2, image_size=112, num_classes=10)
    near = dataclasses.replace(full, patterns=(Near(7),))
    ours, theirs = isotropic.build(near).eval(), lively(isotropic.build(full))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 112, 112)
    assert_close(ours(images), theirs(images))
