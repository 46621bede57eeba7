"""All models by name: `create_model`, `list_models`, and what a checkpoint is."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vicinal.layers.pyramid import Features, Pyramid
from vicinal.models import checkpoint, loading
from vicinal.models.family import Family, Published
from vicinal.models.layout import Fit

MODULES = (
    "nat",
    "dinat_s",
    "isotropic",
    "swin",
    "convnext",
    "poolformer",
    "hornet",
    "van",
    "cswin",
    "pvt",
    "davit",
    "maxvit",
    "litv2",
    "focalnet",
    "oneformer.dinat",
    "oneformer.swin",
    "oneformer.convnext",
    "oneformer.mask2former",
    "stylenat",
)
"""Files of `vicinal.models` that hold a FAMILY."""

NEAREST = 6
"""How many models `identify` compares with a checkpoint key by key."""

_SIZES = {"kernel_size", "window_size", "image_size", "size", "patterns", "backbone_options"}
"""Options that change the size of a position bias."""


@cache
def families() -> dict[str, Family]:
    """The family of every name."""
    found: dict[str, Family] = {}
    for module in MODULES:
        family: Family = importlib.import_module(f"vicinal.models.{module}").FAMILY
        found.update(dict.fromkeys(family.variants, family))
    return found


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows, those that match `pattern` with `*` for anything.

    >>> vicinal.list_models("swin_*")
    ['swin_base', 'swin_large', 'swin_small', 'swin_tiny']
    """
    return sorted(fnmatch.filter(families(), pattern))


def classifiers() -> list[str]:
    """The names whose models classify, and give feature maps, family by family.

    >>> "nat_mini" in classifiers(), "oneformer_dinat_large_ade20k" in classifiers()
    (True, False)
    """
    return [name for name, family in families().items() if family.kind == "classifier"]


def config_of(name: str, **overrides: Any) -> Any:
    """The configuration of a name, with fields overridden.

    >>> config_of("nat_mini", kernel_size=5).kernel_size
    5
    """
    if name not in families():
        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), families(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(list_models())}"
        raise ValueError(f"there is no model {name!r}; {hint}")
    config = families()[name].variants[name]
    fields = [field.name for field in dataclasses.fields(config)]
    unknown = [key for key in overrides if key not in fields]
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(fields)}")
    changed = dataclasses.replace(config, **overrides)
    levels = {key: len(value) for key in fields if _is_per_level(value := getattr(changed, key))}
    if len(set(levels.values())) > 1:
        told = ", ".join(f"{key} {getattr(changed, key)}" for key in levels)
        raise ValueError(f"{name}: as many numbers are needed in each of these, one per stage: {told}")
    return changed


def _is_per_level(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(number, int | float) for number in value)


def create_model(
    name: str,
    pretrained: bool | str | Path | None = None,
    *,
    num_classes: int | None = None,
    features_only: bool = False,
    **overrides: Any,
) -> nn.Module:
    """A model by name: images `[batch, 3, height, width]` to logits, or to a list of feature maps.

    The `stylenat` names are generators, from latents `[batch, 512]` to images.

    >>> model = vicinal.create_model("dinat_mini", num_classes=10, dilations="max")
    >>> model(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 10])

    Args:
        name: one of `list_models()`.
        pretrained: a checkpoint in any layout of the family (`vicinal weights FILE` tells): a path, an address, a
            Hugging Face repository id, or True for the first that is published. It has to fit; only a classifier for
            other classes than an explicit `num_classes` stays fresh, and position biases are interpolated where
            `kernel_size`, `window_size`, `image_size`, `size`, `patterns` or `backbone_options` is overridden.
        num_classes: classes of the classifier, 0 for none (the model then gives one vector per image).
        features_only: return a model that gives feature maps `[batch, channels, height, width]`, finest first;
            `stages=(1, 2, 3)` chooses them, `use_norms=True` puts each through a norm of its own.
        overrides: fields of the model's configuration, for example `dilations="cls384"`.
    """
    options = {key: overrides.pop(key) for key in ("stages", "use_norms") if features_only and key in overrides}
    classes = {} if num_classes is None else {"num_classes": num_classes}
    config = config_of(name, **overrides, **classes)
    family = families()[name]
    if features_only and family.kind == "segmenter":
        raise ValueError(f"features_only: {name} gives segments; take the maps of its backbone, {config.backbone!r}")
    if features_only and family.kind == "generator":
        raise ValueError(f"features_only is for models that take images; {name} makes them")
    model: nn.Module = family.build(config)
    if features_only:
        assert isinstance(model, Pyramid)
        model = Features(model, **options)
    if pretrained is not None and pretrained is not False:
        _load(model, pretrained, name, num_classes, resize_bias=bool(_SIZES & set(overrides)))
    return model


def _load(
    model: nn.Module, pretrained: bool | str | Path, name: str, num_classes: int | None, resize_bias: bool
) -> None:
    family = families()[name]
    if isinstance(pretrained, bool):
        if name not in family.published:
            raise ValueError(f"pretrained=True: no weights of {name} are known to be published; give a path")
        pretrained = family.published[name][0].source
    state = checkpoint.read(checkpoint.find(pretrained), is_whole=family.kind != "classifier").state
    fresh_head = num_classes is not None and classes_of(state, family) != num_classes
    try:
        loading.load(model, state, family, use_classifier=not fresh_head, resize_bias=resize_bias)
    except loading.CheckpointMismatch as error:
        hint = family.hint(state, model)
        raise loading.CheckpointMismatch(f"{name} from {pretrained}: {hint}{error}", error.fit) from None


def classes_of(state: Mapping[str, torch.Tensor], family: Family) -> int | None:
    """How many classes a checkpoint's classifier has, whichever layout it is in; None without a classifier."""
    name = family.classifier + "weight"
    for layout in loading.layouts_of(family).values():
        (theirs,) = layout.pairs([name])[0].theirs
        given = state.get(layout.name(theirs), state.get(theirs))
        if given is not None and given.dim():
            return given.shape[0] - family.extra_classes
    return None


Form = tuple[str, tuple[tuple[str, Any], ...]]
"""A name and the options it is made with."""


@dataclass(frozen=True)
class Candidate:
    """A model a checkpoint may be of: the name, options it needs, the layout, the form and how it fits."""

    name: str
    options: Mapping[str, Any]
    layout: str
    fit: Fit
    published: tuple[Published, ...]
    has_classifier: bool = True

    @property
    def problems(self) -> int:
        """How many keys do not fit."""
        return len(self.fit.missing) + len(self.fit.extra) + len(self.fit.misshapen)


def identify(state: Mapping[str, torch.Tensor]) -> list[Candidate]:
    """The models that a checkpoint may be of, best first; those it fits have no problems.

    Of a segmenter the whole checkpoint is wanted, as `read(path, is_whole=True)` gives it.

    >>> identify(vicinal.create_model("nat_mini").state_dict())[0].name
    'nat_mini'
    """
    whole = _segmenters(state)
    if whole:
        return whole
    forms: list[Form] = []
    for name in classifiers():
        family = families()[name]
        # every set of options that changes a shape, once
        changes = {tuple(sorted(one.changes.items())) for one in family.published.get(name, ())}
        forms += [(name, ()), *((name, change) for change in changes if _SIZES & set(dict(change)))]
    found = [_candidate(state, name, dict(options)) for name, options in _nearest(state, forms)]
    if not any(candidate.has_classifier for candidate in found):  # as detection and segmentation code saves backbones
        bare: list[Form] = [(name, (("features_only", True),)) for name in classifiers()]
        found += [_candidate(state, name, dict(options)) for name, options in _nearest(state, bare)]
    return sorted(found, key=lambda candidate: candidate.problems)


def holds_segmenter(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a checkpoint is of a whole OneFormer or Mask2Former, in any layout.

    >>> holds_segmenter({"sem_seg_head.predictor.class_embed.weight": torch.zeros(20, 256)})
    True
    """
    segmenters = {id(family): family for family in families().values() if family.kind == "segmenter"}
    return any(classes_of(state, family) is not None for family in segmenters.values())


def _segmenters(state: Mapping[str, torch.Tensor]) -> list[Candidate]:
    """The segmenters that a whole checkpoint may be of, those made for as many classes; none for other checkpoints."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, family in families().items():
        classes = classes_of(state, family) if family.kind == "segmenter" else None
        if classes is not None:
            found.append((name, {} if classes == family.variants[name].num_classes else {"num_classes": classes}))
    chosen = [entry for entry in found if not entry[1]] or found
    candidates = [_candidate(state, name, options) for name, options in chosen]
    return sorted(candidates, key=lambda candidate: candidate.problems)


def _nearest(state: Mapping[str, torch.Tensor], forms: list[Form]) -> list[Form]:
    """The forms that hold nearly as many numbers as a checkpoint: the only ones worth a look key by key."""
    numbers = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    apart = {form: abs(_numbers(_meta_model(*form), state, form[0]) - numbers) for form in forms}
    limit = sorted(apart.values())[:NEAREST][-1]
    return [form for form in forms if apart[form] <= limit]


def _numbers(model: nn.Module, state: Mapping[str, torch.Tensor], name: str) -> int:
    _fit_classifier(model, state, name)
    return sum(tensor.numel() for tensor in model.state_dict().values())


def _fit_classifier(model: nn.Module, state: Mapping[str, torch.Tensor], name: str) -> int | None:
    """Give a model as many classes as a checkpoint has; how many, or None where one of them has no classifier."""
    if not isinstance(model, Pyramid):
        return None
    classes = classes_of(state, families()[name])
    with torch.device("meta"):
        model.head.reset(classes or 1000)
    return classes


@cache
def _meta_model(name: str, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    """A model without data, for its shapes."""
    overrides = dict(options)
    is_bare = overrides.pop("features_only", False)
    with torch.device("meta"):
        model = families()[name].build(config_of(name, **overrides))
        if not is_bare:
            return model
        assert isinstance(model, Pyramid)
        return Features(model, use_norms=True)


def _candidate(state: Mapping[str, torch.Tensor], name: str, options: Mapping[str, Any]) -> Candidate:
    family, model = families()[name], _meta_model(name, tuple(options.items()))
    classes = _fit_classifier(model, state, name)
    if family.kind == "segmenter":
        classes = None  # among the options already
    layout, _, fit = loading.match(state, model, family)
    shown = {**options, **({} if classes in (None, 1000) else {"num_classes": classes})}
    return Candidate(name, shown, layout, fit, family.published.get(name, ()), classes is not None)
