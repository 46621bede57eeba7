"""Where heads look: weights as the definition gives them, head by head, and groups as pictures."""

from __future__ import annotations

import pytest
import torch

import vicinal
from vicinal.layers.attention import PatternAttention
from vicinal.pattern import Near, heads, mask
from vicinal.tasks.head_maps import group_panels, head_weights


@pytest.mark.parametrize("query", [(0, 0), (4, 7), (8, 10)])
def test_weights_are_those_of_the_definition(query):
    """Against a softmax over all keys, masked and biased by hand."""
    mixer = PatternAttention(24, 3, heads(Near(3), Near(5, dilation=1), Near(3, dilation=3)), rel_pos_bias=True)
    inputs = torch.randn(1, 9, 11, 24)
    for table in mixer.rpb:
        table.data.normal_()
    got = head_weights(mixer, inputs, query)
    queries, keys, _ = mixer.qkv(inputs).detach().unflatten(-1, (3, 3, 8)).unbind(-3)
    for head, (size, dilation) in enumerate(((3, 1), (5, 1), (3, 3))):
        scores = keys[0, :, :, head] @ queries[(0, *query)][head] * 8**-0.5
        allowed = mask(Near(size, dilation=dilation), (9, 11))[query]
        for row, column in allowed.nonzero().tolist():
            apart = [(place - own) // dilation + size - 1 for place, own in zip((row, column), query, strict=True)]
            scores[row, column] += mixer.rpb[head][(0, *apart)].item()
        expected = scores.masked_fill(~allowed, -torch.inf).flatten().softmax(0).view(9, 11)
        torch.testing.assert_close(got[head], expected, rtol=1e-4, atol=1e-6)


def test_every_group_of_every_level_is_a_picture():
    groups = {"kernel_sizes": ((3,), (7,), (7,), (7,)), "dilations": ((1,), (1,), (1, 2), (1, 4))}
    model = vicinal.create_model("stylenat_fashion32", **groups).eval()
    panels = group_panels(model, model.mapping(torch.randn(1, model.latent_size)).detach())
    captions = [panel.caption for panel in panels]
    assert captions[0] == "the picture"
    assert captions[-2:] == ["32x32, head 1\nNear(7)", "32x32, head 2\nNear(7, dilation=4)"]
    assert len(panels) == 6
    for panel in panels[1:]:
        assert panel.image.shape == (64, 64, 3)
        middle = panel.image[32:34, 32:34].reshape(-1, 3)
        assert (middle == (230, 40, 40)).all()
    near, far = (panel.image[..., 1].astype(int) for panel in panels[-2:])
    assert (near > 100).sum() < (near <= 100).sum(), "a window of 7 of 32 is small"
    rows = (far > 100).any(1).nonzero()[0]
    assert rows.max() - rows.min() >= 6 * 4 * 2, "and a dilated one reaches far"


def test_wrong_input_is_refused():
    mixer = PatternAttention(16, 2, Near(3))
    with pytest.raises(ValueError, match="query must be inside"):
        head_weights(mixer, torch.randn(1, 4, 4, 16), (4, 0))
    with pytest.raises(ValueError, match="without norms"):
        head_weights(PatternAttention(16, 2, Near(3), rotary=True), torch.randn(1, 4, 4, 16), (0, 0))
