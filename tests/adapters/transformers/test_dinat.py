"""transformers' DiNAT: equal to dense masked attention, restored without natten, and given back as it was."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vicinal

pytest.importorskip("transformers")

from transformers import DinatBackbone, DinatConfig, DinatForImageClassification, DinatModel
from transformers.models.dinat import modeling_dinat

from vicinal.adapters.transformers import HostChanged, dinat, patch_dinat, unpatch_dinat
from vicinal.adapters.transformers.host import check_host

from .dense import dense_forward

NATTEN_IS_MISSING = importlib.util.find_spec("natten") is None

TINY = dict(
    depths=[2, 2],
    num_heads=[1, 2],
    embed_dim=16,
    kernel_size=3,
    dilations=[[1, 4], [2, 1]],
    mlp_ratio=2.0,
    drop_path_rate=0.0,
)


@pytest.fixture
def patched():
    patch_dinat()
    yield
    unpatch_dinat()


def with_biases(model):
    """The model in evaluation, its position biases no longer 0."""
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def both(monkeypatch, run):
    """What `run()` returns on our attention and on the dense one."""
    ours = run()
    with monkeypatch.context() as patch:
        patch.setattr(modeling_dinat.NeighborhoodAttention, "forward", dense_forward)
        dense = run()
    return ours, dense


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, missing
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("size", [(64, 64), (97, 75), (20, 130)], ids=["square", "odd", "smaller than the window"])
@pytest.mark.parametrize("extra", [{}, {"layer_scale_init_value": 0.5, "qkv_bias": False}], ids=["plain", "scaled"])
def test_the_model_is_dense_masked_attention(monkeypatch, size, extra):
    model = with_biases(DinatModel(DinatConfig(**TINY, **extra)))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        ours, dense = both(monkeypatch, lambda: model(images, output_hidden_states=True))
    torch.testing.assert_close(ours.last_hidden_state, dense.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pooler_output, dense.pooler_output, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours.hidden_states, dense.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("size", [(64, 64), (40, 72)], ids=["fitting", "padded"])
def test_every_parameter_gets_the_gradient_of_dense_attention(monkeypatch, size):
    model = with_biases(DinatForImageClassification(DinatConfig(**TINY, num_labels=5)))
    images, labels = torch.randn(2, 3, *size), torch.tensor([1, 4])
    ours, dense = both(monkeypatch, lambda: gradients(model, model(images, labels=labels).loss))
    assert any(name.endswith("rpb") for name in ours)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, dense[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)
        # a bias of all keys alike cancels in the softmax
        assert grad.abs().max() > 1e-7 or name.endswith("key.bias"), f"{name} gets no gradient"


@pytest.mark.usefixtures("patched")
def test_the_published_configuration_is_dense_masked_attention(monkeypatch):
    model = with_biases(DinatForImageClassification(DinatConfig(num_labels=1000)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 19_984_174
    images = torch.randn(1, 3, 128, 160)  # smaller than the windows of every level
    with torch.no_grad():
        ours, dense = both(monkeypatch, lambda: model(images).logits)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("size", [(64, 64), (20, 130)])
def test_attention_weights_are_those_of_dense_attention(monkeypatch, size):
    model = with_biases(DinatModel(DinatConfig(**TINY)))
    images = torch.randn(2, 3, *size)
    ours, dense = both(monkeypatch, lambda: model(images, output_attentions=True))
    assert len(ours.attentions) == 2
    for mine, theirs in zip(ours.attentions, dense.attentions, strict=True):
        assert mine.shape[-1] == 9
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.last_hidden_state, model(images).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("patched")
def test_the_backbone_is_dense_masked_attention(monkeypatch):
    model = with_biases(DinatBackbone(DinatConfig(**TINY, out_features=["stem", "stage1", "stage2"])))
    images = torch.randn(1, 3, 52, 84)
    ours, dense = both(monkeypatch, lambda: model(images).feature_maps)
    assert [tuple(maps.shape) for maps in ours] == [(1, 16, 13, 21), (1, 16, 13, 21), (1, 32, 7, 11)]
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("patched")
def test_dropout_of_probabilities_drops_in_training_only(monkeypatch):
    model = with_biases(DinatModel(DinatConfig(**TINY, attention_probs_dropout_prob=0.5)))
    images = torch.randn(1, 3, 64, 64)
    ours, dense = both(monkeypatch, lambda: model(images).last_hidden_state)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)
    attention = model.encoder.levels[0].layers[0].attention.self
    inputs = torch.randn(1, 16, 16, 16)
    attention.train()
    _, weights = attention(inputs, output_attentions=True)
    dropped = (weights == 0).float().mean()
    assert 0.4 < dropped < 0.6
    torch.manual_seed(7)
    first = attention(inputs)[0]
    assert not torch.equal(first, attention(inputs)[0])
    torch.manual_seed(7)
    torch.testing.assert_close(attention(inputs, output_attentions=True)[0], first)
    mean = torch.stack([attention(inputs)[0] for _ in range(400)]).mean(0)
    assert (mean - attention.eval()(inputs)[0]).abs().mean() < 0.1 * (first - mean).abs().mean()


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("asks", [False, True], ids=["fused", "with weights"])
def test_autocast_and_bfloat16_stay_near_float32(asks):
    model = with_biases(DinatModel(DinatConfig(**TINY)))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = model(images).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(images, output_attentions=asks).last_hidden_state
        low = model.to(torch.bfloat16)(images.to(torch.bfloat16), output_attentions=asks).last_hidden_state
    assert (cast - exact).abs().max() < 0.1
    assert (low - exact).abs().max() < 0.1


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("rate", [0.0, 0.2], ids=["fused", "with dropout"])
def test_a_training_step_may_lie_under_autocast_as_a_whole(rate):
    model = with_biases(DinatForImageClassification(DinatConfig(**TINY, attention_probs_dropout_prob=rate))).train()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, model(torch.randn(2, 3, 40, 64), labels=torch.tensor([0, 1])).loss)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in found.values())


@pytest.mark.usefixtures("patched")
def test_the_model_is_one_graph_for_a_compiler():
    model = with_biases(DinatModel(DinatConfig(**TINY)))
    images = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model.encoder, backend="eager", fullgraph=True)
    embedded = model.embeddings(images).detach()
    torch.testing.assert_close(compiled(embedded).last_hidden_state, model.encoder(embedded).last_hidden_state)


@pytest.mark.usefixtures("patched")
def test_weights_survive_a_round_trip(tmp_path):
    model = with_biases(DinatForImageClassification(DinatConfig(**TINY, num_labels=3)))
    model.save_pretrained(tmp_path)
    again = DinatForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images).logits, model(images).logits)


def names_of(modeling):
    """Everything the host's module and its classes hold, by name."""
    found = {name: value for name, value in vars(modeling).items() if name != "__builtins__"}
    for name, value in list(found.items()):
        if isinstance(value, type) and value.__module__ == modeling.__name__:
            found |= {f"{name}.{inner}": what for inner, what in vars(value).items()}
    return found


def test_two_names_are_replaced_and_given_back():
    before = names_of(modeling_dinat)
    patch_dinat()
    during = names_of(modeling_dinat)
    patch_dinat()
    twice = names_of(modeling_dinat)
    unpatch_dinat()
    after = names_of(modeling_dinat)
    unpatch_dinat()
    changed = {name for name in before if during[name] is not before[name]}
    assert changed == {"NeighborhoodAttention.forward", "requires_backends"}
    assert before.keys() == during.keys()
    assert all(twice[name] is during[name] for name in during)
    assert all(after[name] is before[name] for name in before)


def test_what_another_has_put_there_since_stays():
    module, hosts = modeling_dinat.NeighborhoodAttention, modeling_dinat.NeighborhoodAttention.forward
    patch_dinat()
    try:
        module.forward = dense_forward
        unpatch_dinat()
        assert module.forward is dense_forward
    finally:
        module.forward = hosts


@pytest.mark.skipif(not NATTEN_IS_MISSING, reason="natten is installed")
def test_without_the_patch_the_host_refuses():
    with pytest.raises(ImportError, match="natten"):
        DinatModel(DinatConfig(**TINY))


def test_other_requirements_are_still_asked_for():
    patch_dinat()
    try:
        with pytest.raises(KeyError, match="no_such_backend"):
            modeling_dinat.requires_backends(DinatModel, ["natten", "no_such_backend"])
        modeling_dinat.requires_backends(DinatModel, "natten")
    finally:
        unpatch_dinat()


def other_attention(**parts):
    """A class as the host's, with some parts another way."""
    base = modeling_dinat.NeighborhoodAttention
    return type("NeighborhoodAttention", (base,), parts)


class OtherTable(modeling_dinat.NeighborhoodAttention):
    def __init__(self, config, dim, num_heads, kernel_size, dilation):
        super().__init__(config, dim, num_heads, kernel_size, dilation)
        self.rpb = torch.nn.Parameter(torch.zeros(num_heads, kernel_size, kernel_size))


class OtherName(modeling_dinat.NeighborhoodAttention):
    def __init__(self, config, dim, num_heads, kernel_size, dilation):
        super().__init__(config, dim, num_heads, kernel_size, dilation)
        del self.dropout


CHANGES = {
    "no class": ({"NeighborhoodAttention": None}, "no class NeighborhoodAttention"),
    "no check": ({"requires_backends": None}, "no requires_backends"),
    "another forward": (
        {"NeighborhoodAttention": other_attention(forward=lambda self, hidden_states, attention_mask: None)},
        "forward takes self, hidden_states, attention_mask, not self, hidden_states, output_attentions",
    ),
    "another table": ({"NeighborhoodAttention": OtherTable}, "parameters of NeighborhoodAttention"),
    "no dropout": ({"NeighborhoodAttention": OtherName}, "dropout.p"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_host_of_another_shape_is_refused_untouched(monkeypatch, case):
    changes, message = CHANGES[case]
    for name, value in changes.items():
        monkeypatch.setattr(modeling_dinat, name, value)
    before = names_of(modeling_dinat)
    with pytest.raises(HostChanged, match=message):
        patch_dinat()
    assert not dinat._applied
    assert all(value is before[name] for name, value in names_of(modeling_dinat).items())


def test_checking_the_host_draws_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    patch_dinat()
    unpatch_dinat()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("version", ["4.57.6", "0.1", "unknown"])
def test_an_old_host_is_refused(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__=version))
    with pytest.raises(ImportError, match=f"5 or newer, found {version}: pip install vicinal"):
        check_host()


def test_a_missing_host_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="needs transformers, which is not installed: pip install") as caught:
        check_host()
    assert caught.value.name == "transformers"


NEW_NATTEN = """
import sys
sys.path.insert(0, {fake!r})
import torch
from vicinal.measure.peers.installed import mend_torchvision
mend_torchvision()
from transformers.utils import is_natten_available
assert is_natten_available()
from vicinal.adapters.transformers import patch_dinat
patch_dinat()
from transformers import DinatConfig, DinatModel
model = DinatModel(DinatConfig(depths=[1], num_heads=[1], embed_dim=8, dilations=[[1]]))
print(tuple(model(torch.randn(1, 3, 32, 32)).last_hidden_state.shape), is_natten_available())
import transformers.utils
assert transformers.utils.is_natten_available is is_natten_available
"""


def test_a_natten_without_the_old_functions_does_not_matter(tmp_path):
    """natten 0.20 dropped them, and then the host's module does not even import."""
    package = tmp_path / "natten"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.21.7'\n")
    (package / "functional.py").write_text("def na2d(): pass\n")
    path = os.pathsep.join(filter(None, [str(Path(vicinal.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-c", NEW_NATTEN.format(fake=str(tmp_path))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "(1, 8, 8, 8) True"
