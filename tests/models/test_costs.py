"""Parameters to the digit and multiply-adds to three decimals, as published or computed from the papers."""

from __future__ import annotations

import pytest
import torch

from vicinal.models import registry

# name, options, image size, parameters, nominal multiply-adds in billions
TABLE = [
    ("nat_mini", {}, 224, 19_984_174, 2.695),
    ("nat_tiny", {}, 224, 27_901_582, 4.295),
    ("nat_small", {}, 224, 50_743_297, 7.772),
    ("nat_base", {}, 224, 89_769_652, 13.677),
    ("dinat_mini", {}, 224, 19_984_174, 2.695),
    ("dinat_tiny", {}, 224, 27_901_582, 4.295),
    ("dinat_small", {}, 224, 50_719_681, 7.772),
    ("dinat_base", {}, 224, 89_769_652, 13.677),
    ("dinat_large", {}, 224, 200_943_514, 30.458),
    ("dinat_large", {"num_classes": 21841}, 224, 232_976_131, 30.490),
    ("dinat_large", {"dilations": "cls384"}, 384, 200_943_514, 89.505),
    ("dinat_large", {"kernel_size": 11}, 384, 201_144_250, 92.085),
    ("dinat_s_tiny", {}, 224, 28_288_354, 4.491),
    ("dinat_s_small", {}, 224, 49_606_258, 8.741),
    ("dinat_s_base", {}, 224, 87_768_224, 15.431),
    ("dinat_s_large", {}, 224, 196_532_476, 34.476),
    ("dinat_s_large", {"dilations": "cls384"}, 384, 196_532_476, 101.314),
    ("nat_isotropic_small", {}, 224, 21_999_736, 4.308),
    ("nat_isotropic_base", {}, 224, 86_465_800, 16.941),
    ("dinat_isotropic_small", {}, 224, 21_999_736, 4.308),
    ("dinat_isotropic_base", {}, 224, 86_465_800, 16.941),
    ("vitrpb_small", {}, 224, 22_080_376, 4.574),
    ("vitrpb_base", {}, 224, 86_627_080, 17.472),
    ("swin_tiny", {}, 224, 28_288_354, 4.491),
    ("swin_small", {}, 224, 49_606_258, 8.741),
    ("swin_base", {}, 224, 87_768_224, 15.431),
    ("swin_base", {"window_size": 12}, 384, 87_903_584, 47.083),
    ("swin_large", {}, 224, 196_532_476, 34.476),
    ("swin_large", {"window_size": 12}, 384, 196_735_516, 103.919),
    # published as 28.6M and 4.5G, 198M and 34.4G
    ("convnext_tiny", {}, 224, 28_589_128, 4.456),
    ("convnext_large", {}, 224, 197_767_336, 34.361),
    # published as 11.9M and 1.8G, 22M and 4.0G, 4.1M and 0.9G, 23M and 4.3G, 13.2M and 1.9G
    ("poolformer_s12", {}, 224, 11_915_176, 1.812),
    ("hornet_tiny", {}, 224, 22_409_512, 3.968),
    ("van_b0", {}, 224, 4_105_800, 0.864),
    ("cswin_tiny", {}, 224, 22_320_552, 4.324),
    ("pvt_tiny", {}, 224, 13_229_288, 1.933),
    # published as 28.3M and 4.5G, 31M and 5.6G (which counts more than products), 28M and 3.7G, 28.4M and 4.4G
    ("davit_tiny", {}, 224, 28_360_168, 4.522),
    ("maxvit_tiny", {}, 224, 30_916_528, 5.545),
    ("litv2_small", {}, 224, 27_844_000, 3.724),
    ("focalnet_tiny", {}, 224, 28_427_116, 4.403),
]


def measured(name, options, image_size):
    with torch.device("meta"):
        return registry.families()[name].build(registry.config_of(name, **options)).cost(image_size)


@pytest.mark.parametrize(
    ("name", "options", "image_size", "parameters", "multiply_adds"),
    TABLE,
    ids=[f"{row[0]}-{row[2]}{''.join(f'-{value}' for value in row[1].values())}" for row in TABLE],
)
def test_cost_is_the_published_one(name, options, image_size, parameters, multiply_adds):
    cost = measured(name, options, image_size)
    assert cost.parameters == parameters
    assert round(cost.nominal / 1e9, 3) == multiply_adds


def test_the_table_has_every_name():
    assert {row[0] for row in TABLE} == set(registry.classifiers())


def test_shifted_windows_cost_less_than_papers_count():
    cost = measured("swin_tiny", {}, 224)
    assert cost.exact < cost.nominal


def test_neighborhoods_on_whole_maps_cost_what_papers_count():
    cost = measured("dinat_mini", {}, 224)
    assert cost.exact == cost.nominal
