"""Small models of diffusers with random weights, and what the tests do with them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from vicinal import Near, Window
from vicinal.adapters.diffusers.processors import Processor

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


ALL = {"ltx": (ltx, "ltx-decoder"), "wan": (wan, LOCAL), "cosmos": (cosmos, LOCAL), "control": (control, LOCAL)}
all_models = pytest.mark.parametrize(("make", "choice"), ALL.values(), ids=ALL)
