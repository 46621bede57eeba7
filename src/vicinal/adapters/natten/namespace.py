"""Which name lives in which module of NATTEN, from 0.14 to 0.21."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

from vicinal.adapters.natten import arguments, backends, context, flops, functional, modules, types

FUSED = ("na1d", "na2d", "na3d")
MODULES = ("NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D")


def _from(module: ModuleType, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


def _functions(module: ModuleType) -> dict[str, Any]:
    """Every function that a module defines, also under its second name."""
    return {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and isinstance(value, FunctionType)
    }


_fused = _from(functional, (*FUSED, "attention", "merge_attentions"))
_modules = _from(modules, MODULES)
_switches = _functions(context)
_configs: dict[str, Callable[..., Any]] = dict.fromkeys(backends.CONFIGS, backends.no_configs)
_choices = _from(
    backends, ("choose_backend", "choose_fmha_backend", "get_compatible_backends", "get_compatible_fmha_backends")
)
_checks = _from(arguments, ("check_all_args", "get_num_na_weights"))
_device = _from(arguments, ("get_device_cc",))
_libnatten = {"HAS_LIBNATTEN": backends.HAS_LIBNATTEN}


def _of_rank(rank: int) -> dict[str, Any]:
    """What 0.17's module of one rank had in it."""
    return {
        **_from(modules, (MODULES[rank - 1],)),
        **_from(functional, (f"na{rank}d", f"na{rank}d_qk", f"na{rank}d_av")),
    }


CONTENTS: dict[str, dict[str, Any]] = {
    "natten": {
        **_switches, **_modules, **_fused, **_configs, **_libnatten,
        "NeighborhoodAttention": modules.NeighborhoodAttention,
    },
    "natten.functional": {**_switches, **_from(functional, functional.__all__)},
    "natten.context": {
        **_switches, **_from(context, ("NattenContext", "AutotunerContext", "MemoryUsagePreference")),
    },
    "natten.modules": _modules,
    "natten.types": {name: value for name, value in vars(types).items() if name[0].isupper() and name != "TypeAlias"},
    "natten.backends": {**_configs, **_choices},
    "natten.backends.configs": _configs,
    "natten.attn_merge": _from(functional, ("merge_attentions",)),
    "natten.version": {},
    "natten._environment": _libnatten,
    "natten.utils": {**_checks, **_device},
    "natten.utils.checks": _checks,
    "natten.utils.device": _device,
    "natten.utils.misc": _device,
    "natten.utils.varlen": _from(arguments, ("generate_varlen_parameters",)),
    "natten.na1d": _of_rank(1),
    "natten.na2d": _of_rank(2),
    "natten.na3d": _of_rank(3),
    "natten.natten1d": _of_rank(1),
    "natten.natten2d": {**_of_rank(2), "NeighborhoodAttention": modules.NeighborhoodAttention},
    "natten.natten3d": _of_rank(3),
    "natten.experimental": _from(functional, FUSED),
    "natten.flops": _functions(flops),
}  # fmt: skip
"""For each module what is in it, besides its submodules and `__version__`."""
