"""Models of diffusers on our operator: exact where the host has an answer, differentiable where it has none."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vicinal import Full, Near, Window, heads
from vicinal.pattern import bounds, mask

diffusers = pytest.importorskip("diffusers")

from vicinal.adapters.diffusers import apply, hosts, restore  # noqa: E402 - the host comes first
from vicinal.adapters.diffusers.processors import Processor  # noqa: E402

# what diffusers does in eager mode on a CPU, and says so
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

LOCAL = (Near(3), Near(2, dilation=2), Window(3, shift=1))


def ltx() -> Any:
    """A tiny decoder with odd and even kernels; its stages see 4x3x4, 4x3x4, 7x3x4, 7x6x4 and 5x6x8 tokens."""
    return diffusers.LTX2VideoDiffusionDecoderModel(
        latent_channels=4,
        patch_size=2,
        decoder_head_dim=8,
        decoder_stage_channels=(64, 32, 16, 16, 16),
        decoder_stage_depths=(1, 2, 1, 1, 2),
        decoder_stage_kernels=((3, 3, 2), (4, 2, 3), (2, 3, 4), (3, 5, 4)),
        decoder_upsample_strides=((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 2)),
        decoder_upsample_channel_reductions=(2, 2, 1, 1),
        decoder_stage5_kernel=(3, 4, 5),
        decoder_t_emb_dim=16,
        temporal_compression_ratio=4,
    ).eval()


def decoded(model: Any, latents: torch.Tensor) -> torch.Tensor:
    return model(latents, generator=torch.Generator().manual_seed(3)).sample


class Dense:
    """The decoder's attention written out: every window by the host's words, every pair of tokens computed."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, block_mask: Any = None) -> torch.Tensor:
        batch, *grid, _ = hidden_states.shape
        query, key, value = (t.flatten(1, 3).transpose(1, 2) for t in attn.project_qkv(hidden_states))
        axes = []
        for length, size in zip(grid, attn.kernel_size, strict=True):
            sees = torch.zeros(length, length, dtype=torch.bool)
            for place in range(length):
                first = min(max(place - size // 2, 0), length - size)
                sees[place, first : first + size] = True
            axes.append(sees)
        sees = torch.einsum("ad,be,cf->abcdef", *(axis.double() for axis in axes)).reshape(len(query[0, 0]), -1) > 0
        scores = (query @ key.transpose(-1, -2)).masked_fill(~sees, -torch.inf)
        out = scores.softmax(-1) @ value
        return attn.to_out[0](out.transpose(1, 2).reshape(batch, *grid, -1))


def wan(**changes: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "freq_dim": 8}
    return diffusers.WanTransformer3DModel(text_dim=8, in_channels=4, out_channels=4, **{**sizes, **changes}).eval()


def wan_call(model: Any, video: torch.Tensor) -> torch.Tensor:
    text = torch.linspace(-1, 1, len(video) * 40).reshape(-1, 5, 8).to(video)
    return model(video, timestep=torch.full((len(video),), 7), encoder_hidden_states=text).sample


def cosmos(**changes: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "adaln_lora_dim": 4}
    sizes |= {"text_embed_dim": 8, "max_size": (8, 24, 24), "in_channels": 4, "out_channels": 4}
    return diffusers.CosmosTransformer3DModel(**sizes, **changes).eval()


def cosmos_call(model: Any, video: torch.Tensor) -> torch.Tensor:
    text = torch.linspace(-1, 1, len(video) * 40).reshape(-1, 5, 8).to(video)
    times, padding = torch.full((len(video),), 7), video.new_zeros(1, 1, *video.shape[-2:])
    return model(hidden_states=video, timestep=times, encoder_hidden_states=text, padding_mask=padding, fps=24).sample


def control() -> Any:
    return diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2, in_channels=7, latent_channels=6, model_channels=24, num_attention_heads=2,
        attention_head_dim=12, text_embed_dim=8, adaln_lora_dim=4, max_size=(8, 24, 24),
    ).eval()  # fmt: skip


def control_call(model: Any, video: torch.Tensor) -> torch.Tensor:
    text = torch.linspace(-1, 1, len(video) * 40).reshape(-1, 5, 8).to(video)
    times, condition = torch.full((len(video),), 7), torch.ones_like(video[:, :1])
    padding = video.new_zeros(1, 1, *video.shape[-2:])
    return torch.cat(model(video, video.flip(2), times, text, condition, 1.0, padding).control_block_samples)


VIDEO = {"wan": (wan, wan_call), "cosmos": (cosmos, cosmos_call), "control": (control, control_call)}
video_models = pytest.mark.parametrize(("make", "call"), VIDEO.values(), ids=VIDEO)


class Masked:
    """The host's own processor with a mask of every pair of tokens."""

    def __init__(self, inner: Any, sees: torch.Tensor) -> None:
        self.inner, self.sees = inner, sees

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        rotary_emb: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        rotary = image_rotary_emb if rotary_emb is None else rotary_emb
        return self.inner(attn, hidden_states, None, self.sees, rotary)


def draw(model: nn.Module) -> None:
    """Weights of ordinary size also where the host begins with zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter.shape[-1]) ** 0.5)


def processors(model: nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def ours(model: nn.Module) -> list[Processor]:
    return [processor for processor in processors(model) if isinstance(processor, Processor)]


def gradients(out: torch.Tensor, model: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of everything, for a fixed gradient of the output."""
    named = {**dict(model.named_parameters()), **{f"input {i}": tensor for i, tensor in enumerate(inputs)}}
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape).cos()
    found = torch.autograd.grad(out, list(named.values()), ramp, allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def assert_close(found: torch.Tensor, wanted: torch.Tensor, share: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=share * float(wanted.abs().max()))


# --- the LTX-2.5 decoder


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 5, 4)], ids=str)
def test_the_decoder_computes_what_its_own_processor_does(shape):
    model = ltx()
    draw(model)
    latents = torch.randn(1, 4, *shape)
    with torch.no_grad():
        wanted = decoded(model, latents)
        found = decoded(apply(model, "ltx-decoder"), latents)
    assert len(ours(model)) == 7
    assert_close(found, wanted)


@pytest.mark.parametrize("grid", [(3, 4, 5), (7, 5, 6), (4, 4, 9)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 4, 5), (2, 3, 3), (1, 1, 1)], ids=str)
def test_a_layer_computes_what_its_own_processor_does(grid, kernel):
    model = ltx()
    layer = model.decoder.diff_blocks[1].attn
    layer.kernel_size = kernel
    inputs = torch.randn(2, *grid, 16)
    with torch.no_grad():
        wanted = layer(inputs)
        apply(model, "ltx-decoder")
        assert_close(layer(inputs), wanted)


def test_tiled_decoding_stays_the_hosts():
    model = ltx()
    draw(model)
    model.spatial_compression_ratio = 4
    model.enable_tiling(12, 20, 8, 8, 12, 4)
    latents = torch.randn(1, 4, 4, 6, 6)
    with torch.no_grad():
        wanted = decoded(model, latents)
        whole = model.decoder(latents, generator=torch.Generator().manual_seed(3))
        found = decoded(apply(model, "ltx-decoder"), latents)
    assert not torch.allclose(whole, wanted)  # there were tiles
    assert_close(found, wanted)


def test_every_gradient_of_the_decoder_is_that_of_the_dense_computation():
    model = ltx().double()
    draw(model)
    latents = torch.randn(1, 4, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    dense = copy.deepcopy(model)
    dense.set_attn_processor(Dense())
    truth = decoded(dense, latents)
    wanted = gradients(truth, dense, latents)
    out = decoded(apply(model, "ltx-decoder"), latents)
    found = gradients(out, model, latents)
    assert_close(out.detach(), truth.detach())
    assert found.keys() == wanted.keys()
    assert len(found) > 100
    for name, gradient in wanted.items():
        assert_close(found[name], gradient)


def test_the_hosts_own_processor_has_no_gradient_on_a_cpu():
    # should this fail, the page in docs/ no longer tells the truth
    latents = torch.randn(1, 4, 2, 3, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="backward"):
        decoded(ltx(), latents).sum().backward()


def test_the_decoder_takes_other_patterns():
    model = ltx()
    latents = torch.randn(1, 4, 2, 3, 4)
    with torch.no_grad():
        wanted = decoded(model, latents)
        kernels = [module.kernel_size for module in model.modules() if hasattr(module, "kernel_size")]
        by_hand = apply(model, lambda layer: tuple(map(Near, kernels[layer])))
        assert_close(decoded(by_hand, latents), wanted)
        assert not torch.allclose(decoded(apply(model, Full()), latents), wanted)


# --- video transformers


@video_models
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 10), (1, 4, 4)], ids=str)
def test_a_full_pattern_is_the_original(make, call, shape):
    model = make()
    draw(model)
    video = torch.randn(2, 4, *shape)
    with torch.no_grad():
        wanted = call(model, video)
        assert_close(call(apply(model, Full()), video), wanted)
    assert len(ours(model)) == 2


@video_models
def test_a_local_pattern_is_the_original_under_a_mask_also_in_gradients(make, call):
    grid = (3, 4, 5)
    model = make()
    draw(model)
    video = torch.randn(1, 4, grid[0], 2 * grid[1], 2 * grid[2], requires_grad=True)
    masked = copy.deepcopy(model)
    sees = mask(LOCAL, grid).reshape(60, 60)
    for name, module in masked.named_modules():
        if name.endswith("attn1"):
            module.set_processor(Masked(module.processor, sees))
    truth = call(masked, video)
    wanted = gradients(truth, masked, video)
    out = call(apply(model, LOCAL), video)
    found = gradients(out, model, video)
    assert_close(out.detach(), truth.detach())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, 3e-5)


@video_models
def test_cross_attention_stays_untouched(make, call):
    model = make()
    before = [module.processor for name, module in model.named_modules() if name.endswith("attn2")]
    apply(model, LOCAL)
    after = [module.processor for name, module in model.named_modules() if name.endswith("attn2")]
    assert len(before) == 2
    assert all(first is second for first, second in zip(before, after, strict=True))


@video_models
def test_a_given_grid_is_the_grid_that_would_be_read(make, call):
    model = make()
    video = torch.randn(1, 4, 3, 8, 10)
    with torch.no_grad():
        wanted = call(apply(model, LOCAL), video)
        found = call(apply(model, LOCAL, grid=(3, 4, 5)), video)
        assert torch.equal(found, wanted)
        assert not model._forward_pre_hooks and not model._forward_hooks
        with pytest.raises(ValueError, match=r"grid \(3, 5, 5\) has 75 tokens, the sequence 60"):
            call(apply(model, LOCAL, grid=(3, 5, 5)), video)


def test_every_call_has_its_own_grid():
    model = apply(wan(), LOCAL)
    wide, high = torch.randn(1, 4, 1, 8, 16), torch.randn(1, 4, 1, 16, 8)  # as many tokens
    with torch.no_grad():
        first, second = wan_call(model, wide), wan_call(model, high)
        assert torch.equal(wan_call(apply(model, LOCAL, grid=(1, 4, 8)), wide), first)
        assert torch.equal(wan_call(apply(model, LOCAL, grid=(1, 8, 4)), high), second)


def test_the_video_may_be_the_first_argument_or_named():
    model = apply(wan(), LOCAL)
    video, rest = (
        torch.randn(1, 4, 2, 6, 6),
        {"timestep": torch.tensor([7]), "encoder_hidden_states": torch.ones(1, 5, 8)},
    )
    with torch.no_grad():
        assert torch.equal(model(video, **rest).sample, model(hidden_states=video, **rest).sample)


def test_gradient_checkpointing_remembers_the_grid_of_a_call_that_is_over():
    model = apply(wan(), LOCAL).train()
    video = torch.randn(1, 4, 3, 8, 10, requires_grad=True)
    wanted = gradients(wan_call(model, video), model, video)
    model.enable_gradient_checkpointing()
    out = wan_call(model, video)
    with torch.no_grad():
        wan_call(model, torch.randn(1, 4, 2, 6, 6))
    found = gradients(out, model, video)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_gradient_checkpointing_refuses_to_guess_between_two_grids():
    model = apply(wan(), LOCAL).train()
    model.enable_gradient_checkpointing()
    out = wan_call(model, torch.randn(1, 4, 1, 8, 16))
    wan_call(model, torch.randn(1, 4, 1, 16, 8))
    with pytest.raises(RuntimeError, match="two grids with as many tokens"):
        out.sum().backward()


def test_a_failed_call_leaves_no_grid_behind():
    model = apply(wan(), LOCAL)
    with pytest.raises(RuntimeError):
        wan_call(model, torch.randn(1, 3, 1, 8, 8))  # a channel too few
    assert ours(model)[0].source.current is None
    with pytest.raises(RuntimeError, match="the model itself was not called"):
        model.blocks[0].attn1(torch.randn(1, 7, 24))


def test_a_call_without_a_video_fails_with_the_hosts_words():
    model = apply(wan(), LOCAL)
    with pytest.raises(TypeError, match="missing 3 required positional arguments: 'hidden_states'"):
        model()
    with pytest.raises(ValueError, match="not enough values to unpack"):
        wan_call(model, torch.randn(1, 4, 8, 8))


def test_fused_projections_give_the_same():
    model = apply(wan(), LOCAL)
    video = torch.randn(1, 4, 3, 8, 10)
    with torch.no_grad():
        wanted = wan_call(model, video)
        model.fuse_qkv_projections()
        assert model.blocks[0].attn1.fused_projections
        assert_close(wan_call(model, video), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half_precision(dtype):
    model = wan().to(dtype)
    video = torch.randn(1, 4, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        wanted = wan_call(model, video)
        found = wan_call(apply(model, Full()), video)
    assert found.dtype == wanted.dtype
    assert_close(found, wanted, 8 * torch.finfo(dtype).eps)


def test_a_compiled_model_is_one_graph_and_reads_the_grid_of_each_call():
    model = apply(wan(num_layers=1), LOCAL)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for shape in [(1, 8, 16), (1, 16, 8)]:  # as many tokens
        video = torch.randn(1, 4, *shape)
        with torch.no_grad():
            assert_close(wan_call(compiled, video), wan_call(model, video))
    torch._dynamo.reset()


def test_the_pattern_may_depend_on_the_layer_and_leave_one_alone():
    model = wan()
    own = model.blocks[0].attn1.processor
    apply(model, lambda layer: None if layer == 0 else heads(Near(3), Full()))
    assert model.blocks[0].attn1.processor is own
    assert "heads(Near(3), Full())" in repr(model.blocks[1].attn1.processor)
    with torch.no_grad():
        wan_call(model, torch.randn(1, 4, 3, 8, 8))


def test_bounds_are_a_pattern_too():
    model, video = wan(), torch.randn(1, 4, 3, 8, 10)
    with torch.no_grad():
        wanted = wan_call(apply(model, LOCAL), video)
        assert torch.equal(wan_call(apply(model, bounds(LOCAL, (3, 4, 5))), video), wanted)


# --- what is touched


ALL = {"ltx": (ltx, "ltx-decoder"), "wan": (wan, LOCAL), "cosmos": (cosmos, LOCAL), "control": (control, LOCAL)}
all_models = pytest.mark.parametrize(("make", "choice"), ALL.values(), ids=ALL)


@all_models
def test_restore_puts_back_what_was_there(make, choice):
    model = make()
    before, keys = processors(model), list(model.state_dict())
    assert apply(model, choice) is model
    assert list(model.state_dict()) == keys
    assert ours(model)
    assert restore(restore(model)) is model
    assert all(first is second for first, second in zip(before, processors(model), strict=True))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@all_models
def test_applying_again_replaces_and_does_not_stack(make, choice):
    model = make()
    before = processors(model)
    apply(model, choice)
    count = len(ours(model))
    apply(apply(model, Full()), choice)
    assert len(ours(model)) == count
    assert not any(isinstance(processor.replaced, Processor) for processor in ours(model))
    assert len(model._forward_pre_hooks) <= 1
    restore(model)
    assert all(first is second for first, second in zip(before, processors(model), strict=True))


@all_models
def test_a_refused_apply_changes_nothing(make, choice):
    model = apply(make(), choice)
    before = processors(model)
    with pytest.raises(ValueError, match="axes"):
        apply(model, lambda layer: Near(3) if layer == 0 else (Near(3), Near(3)))
    assert all(first is second for first, second in zip(before, processors(model), strict=True))


def test_a_copy_has_its_own_grid_and_can_be_restored():
    model = apply(wan(), LOCAL)
    other = copy.deepcopy(model)
    video = torch.randn(1, 4, 3, 8, 10)
    with torch.no_grad():
        assert torch.equal(wan_call(other, video), wan_call(model, video))
    assert ours(other)[0].source is not ours(model)[0].source
    restore(other)
    assert not other._forward_pre_hooks
    assert len(model._forward_pre_hooks) == 1


def test_processors_set_over_ours_stay_and_the_watching_ends():
    model = wan()
    theirs = model.blocks[0].attn1.processor
    apply(model, LOCAL).set_attn_processor(theirs)
    assert len(model._forward_pre_hooks) == 1
    restore(model)
    assert all(processor is theirs for processor in processors(model))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the host's norms under autocast
@pytest.mark.parametrize(("make", "call"), [*VIDEO.values(), (ltx, decoded)], ids=[*VIDEO, "ltx"])
def test_autocast_is_obeyed(make, call):
    model = make()
    draw(model)
    video = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = call(model, video)
        found = call(apply(model, "ltx-decoder" if make is ltx else Full()), video)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert_close(found, wanted, 8 * torch.finfo(torch.bfloat16).eps)


def test_weights_saved_with_ours_load_without(tmp_path):
    model, video = wan(), torch.randn(1, 4, 2, 6, 6)
    with torch.no_grad():
        wanted = wan_call(model, video)
        apply(model, LOCAL).save_pretrained(tmp_path)
        again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
        assert_close(wan_call(again, video), wanted)


# --- what is refused


def test_a_joint_model_is_refused_with_the_reason():
    joint = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=1, attention_head_dim=8, axes_dims_rope=(2, 2, 4),
        in_channels=4, joint_attention_dim=8, pooled_projection_dim=8,
    )  # fmt: skip
    with pytest.raises(TypeError, match="text and video tokens together, which is not covered yet"):
        apply(joint, Near(3))


JOINT = ["FluxTransformer2DModel", "Flux2Transformer2DModel", "HunyuanVideoTransformer3DModel", "SD3Transformer2DModel",
         "HunyuanVideo15Transformer3DModel", "HunyuanVideoFramepackTransformer3DModel", "CogVideoXTransformer3DModel",
         "HunyuanImageTransformer2DModel", "QwenImageTransformer2DModel", "MochiTransformer3DModel"]  # fmt: skip


@pytest.mark.parametrize("name", JOINT)
def test_joint_models_are_known_by_the_names_they_have(name):
    assert getattr(diffusers, name).__name__ == name
    assert hosts.JOINT.fullmatch(name)


def test_other_models_are_refused_with_what_is_supported():
    with pytest.raises(TypeError, match="must be one of LTX2VideoDiffusionDecoderModel, WanTransformer3DModel"):
        apply(nn.Linear(2, 2), Near(3))
    with pytest.raises(TypeError, match=r"WanTransformer3DModel.*got Linear"):
        restore(nn.Linear(2, 2))
    tiny = diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4)
    with pytest.raises(TypeError, match="other models of diffusers are not covered yet"):
        apply(tiny, Near(3))
    pipeline = diffusers.DDPMPipeline(nn.Identity(), diffusers.DDPMScheduler())
    with pytest.raises(TypeError, match=r"such as pipeline\.transformer"):
        apply(pipeline, Near(3))


@pytest.mark.parametrize(
    ("make", "choice", "grid", "said"),
    [
        (wan, "ltx-decoder", None, "this model has no presets"),
        (ltx, "natten", None, "the presets 'ltx-decoder', got 'natten'"),
        (wan, (Near(3), Near(3)), None, "got 2 axes"),
        (wan, bounds(Near(3), (4, 4)), None, "got 2 axes"),
        (wan, Near, None, r"write Near\(\.\.\.\)"),
        (wan, 7, None, "preset_or_pattern must be an axis kind"),
        (wan, None, None, "preset_or_pattern must be an axis kind"),
        (wan, Near(3), (4, 4), "numbers of tokens along"),
        (wan, Near(3), (4, 4, 0), "grid"),
        (ltx, Near(3), (4, 4, 4), "know their grid"),
    ],
    ids=str,
)
def test_arguments_that_mean_nothing_are_refused(make, choice, grid, said):
    with pytest.raises(ValueError, match=said):
        apply(make(), choice, grid=grid)


def test_the_back_end_is_the_one_asked_for():
    model, video = wan(), torch.randn(1, 4, 2, 4, 4)
    with pytest.raises(ValueError, match="nothing"):
        apply(model, LOCAL, backend="nothing")
    with torch.no_grad():
        wanted = wan_call(apply(model, LOCAL), video)
        assert_close(wan_call(apply(model, LOCAL, backend="reference"), video), wanted)
    assert {processor.backend for processor in ours(model)} == {"reference"}


def test_a_processor_that_does_something_else_is_not_thrown_away():
    model = wan()
    model.blocks[1].attn1.set_processor(Masked(None, torch.ones(1)))
    with pytest.raises(ValueError, match="layer 1 has the processor Masked"):
        apply(model, Near(3))


def test_a_mask_beside_the_pattern_is_refused():
    model = apply(wan(), Near(3), grid=(1, 2, 2))
    tokens = torch.randn(1, 4, 24)
    with pytest.raises(ValueError, match="attention_mask"):
        model.blocks[0].attn1(tokens, attention_mask=torch.ones(4, 4))
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model.blocks[0].attn1(tokens, encoder_hidden_states=tokens)


def test_an_old_diffusers_is_refused(monkeypatch):
    model = wan()
    for version in ("0.41.2", "0.9.0.dev0", "unknown"):
        monkeypatch.setattr(diffusers, "__version__", version)
        with pytest.raises(ImportError, match=f"needs diffusers 0.42 or newer, found {version}"):
            apply(model, Near(3))
    monkeypatch.setattr(diffusers, "__version__", "1.0.0.dev0")
    apply(model, Near(3))


@all_models
def test_a_diffusers_of_another_shape_is_refused(make, choice, monkeypatch):
    model = make()
    host = hosts.host_of(model)
    kind = getattr(sys.modules[host.home], host.replaces[0])
    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", lambda self, attn, tokens, grid: tokens)
        with pytest.raises(RuntimeError, match=f"{kind.__name__} takes tokens, grid instead of hidden_states"):
            apply(model, choice)
    with monkeypatch.context() as patch:
        patch.delattr(sys.modules[host.home], kind.__name__)
        with pytest.raises(RuntimeError, match=f"there is no {kind.__name__}"):
            apply(model, choice)
    for layer in hosts.layers_of(host, model):
        del layer.to_out
    with pytest.raises(RuntimeError, match="has no to_out"):
        apply(model, choice)
    for name in ("decoder", "blocks", "transformer_blocks", "control_blocks"):
        if hasattr(model, name):
            setattr(model, name, nn.ModuleList())
    with pytest.raises(RuntimeError, match="has no layers named"):
        apply(model, choice)


def test_without_diffusers_the_import_says_how_to_get_it():
    code = "import sys; sys.modules['diffusers'] = None; import vicinal.adapters.diffusers"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode
    assert "ModuleNotFoundError: vicinal.adapters.diffusers needs diffusers 0.42 or newer: pip install" in ran.stderr


def test_the_page_shows_the_measured_figures():
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("ltx_decoder", root / "benchmarks" / "ltx_decoder.py")
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up
        patch.setitem(sys.modules, "ltx_decoder", script)
        spec.loader.exec_module(script)
    page, found = (root / "docs" / "diffusers.md").read_text(), json.loads(script.RESULTS.read_text())
    assert [row["case"]["name"] for row in found["rows"][::2]] == list(script.CASES)
    assert script.shown(page, found) == page, "run benchmarks/ltx_decoder.py again"
