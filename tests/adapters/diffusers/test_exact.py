"""Models of diffusers on our operator: exact where the host has an answer, differentiable where it has none."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from vicinal import Full, Near, heads
from vicinal.pattern import bounds, mask

pytest.importorskip("diffusers")


from vicinal.adapters.diffusers import apply

from .models import LOCAL, Dense, Masked, assert_close, decoded, draw, gradients, ltx, ours, video_models, wan, wan_call

# what diffusers does in eager mode on a CPU, and says so
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


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


def test_threads_that_share_a_model_have_each_their_own_grid():
    model = apply(wan(), LOCAL)
    videos = [torch.randn(1, 4, *shape) for shape in ((1, 8, 16), (1, 16, 8), (3, 8, 10))]
    inside = threading.Barrier(len(videos), timeout=60)

    def meet(*_: Any) -> None:
        inside.wait()  # all are in the model at once

    handle = model.blocks[0].attn1.register_forward_pre_hook(meet)

    def run(video: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return wan_call(model, video)

    with ThreadPoolExecutor(len(videos)) as pool:
        found = list(pool.map(run, videos))
    handle.remove()
    for video, out in zip(videos, found, strict=True):
        assert torch.equal(out, run(video))


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
    assert ours(model)[0].source.current == {}
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
