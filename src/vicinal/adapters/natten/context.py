"""NATTEN's process-wide switches. Ours does without them: each keeps its state and gives it back, and changes nothing.

They chose among kernels that are not here, so an honest switch is one that says what it was set to. What asks about
abilities (`has_fused_na`) answers for our operator: fused attention runs everywhere, half precision questions are
about a CUDA device, and the GEMM kernels do not exist.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, ClassVar, Literal

import torch


class MemoryUsagePreference(enum.Enum):
    """How much memory NATTEN's backward may take."""

    Default = 0
    Strict = 1
    Unrestricted = 2


class NattenContext:
    """The state of the switches."""

    is_deterministic_mode_enabled: ClassVar[bool]
    is_fused_na_enabled: ClassVar[bool]
    is_kv_parallelism_enabled: ClassVar[bool]
    use_flex_attention: ClassVar[bool]
    force_flex_attention: ClassVar[bool]
    flex_compile_allowed: ClassVar[bool]
    flex_compile_backprop_allowed: ClassVar[bool]
    training_memory_preference: ClassVar[MemoryUsagePreference]
    tf32_in_gemm_na: ClassVar[bool]
    tiled_na: ClassVar[bool]
    gemm_na: ClassVar[bool]

    @staticmethod
    def reset() -> None:
        """Set every switch to what NATTEN begins with."""
        NattenContext.is_deterministic_mode_enabled = False
        NattenContext.is_fused_na_enabled = False
        NattenContext.is_kv_parallelism_enabled = True
        NattenContext.use_flex_attention = False
        NattenContext.force_flex_attention = False
        NattenContext.flex_compile_allowed = False
        NattenContext.flex_compile_backprop_allowed = False
        NattenContext.training_memory_preference = MemoryUsagePreference.Default
        NattenContext.tf32_in_gemm_na = True
        NattenContext.tiled_na = True
        NattenContext.gemm_na = True


NattenContext.reset()


def set_memory_usage_preference(pref: Literal["default", "strict", "unrestricted"] = "default") -> None:
    """Keep a preference; our back ends plan their memory themselves."""
    wanted = {preference.name.lower(): preference for preference in MemoryUsagePreference}
    if pref not in wanted:
        raise ValueError(f"pref must be one of {', '.join(wanted)}, got {pref!r}")
    NattenContext.training_memory_preference = wanted[pref]


def get_memory_usage_preference() -> MemoryUsagePreference:
    """The preference that was set."""
    return NattenContext.training_memory_preference


def is_memory_usage_default() -> bool:
    """Whether the preference is the default."""
    return get_memory_usage_preference() is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    """Whether the preference is "strict"."""
    return get_memory_usage_preference() is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    """Whether the preference is "unrestricted"."""
    return get_memory_usage_preference() is MemoryUsagePreference.Unrestricted


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Keep a flag. What makes our results repeatable is `torch.use_deterministic_algorithms`."""
    NattenContext.is_deterministic_mode_enabled = bool(mode)


def are_deterministic_algorithms_enabled() -> bool:
    """The flag that was set."""
    return NattenContext.is_deterministic_mode_enabled


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Keep a flag; it was about NATTEN's backward kernels."""
    NattenContext.is_kv_parallelism_enabled = bool(mode)


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """The flag that was set."""
    return NattenContext.is_kv_parallelism_enabled


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Keep two flags; we do not compile FlexAttention. With `mode=False` both are off."""
    NattenContext.flex_compile_allowed = bool(mode)
    NattenContext.flex_compile_backprop_allowed = bool(mode and backprop)


def allow_flex_compile_backprop(mode: bool = True) -> None:
    """Keep the second of the two flags."""
    NattenContext.flex_compile_backprop_allowed = bool(mode)


def disable_flex_compile() -> None:
    """Both flags off."""
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    """The second flag off."""
    allow_flex_compile_backprop(False)


def is_flex_compile_allowed() -> bool:
    """The first flag."""
    return NattenContext.flex_compile_allowed


def is_flex_compile_backprop_allowed() -> bool:
    """The second flag."""
    return NattenContext.flex_compile_backprop_allowed


def use_fused_na(
    mode: bool = True, kv_parallel: bool = True, use_flex_attention: bool = False, force_flex_attention: bool = False
) -> None:
    """Keep the flags of 0.17. Its modules chose by the first; ours fuse whenever nothing forbids it."""
    NattenContext.is_fused_na_enabled = bool(mode)
    NattenContext.is_kv_parallelism_enabled = bool(mode and kv_parallel)
    NattenContext.use_flex_attention = bool(mode and (use_flex_attention or force_flex_attention))
    NattenContext.force_flex_attention = bool(mode and force_flex_attention)


def is_fused_na_enabled() -> bool:
    """The flag that `use_fused_na` set."""
    return NattenContext.is_fused_na_enabled


def use_flex_attention() -> None:
    """`use_fused_na` with the flag for FlexAttention."""
    use_fused_na(True, use_flex_attention=True)


def should_use_flex_attention() -> bool:
    """The flag that was set."""
    return NattenContext.use_flex_attention


def force_flex_attention() -> None:
    """`use_fused_na` with both flags for FlexAttention."""
    use_fused_na(True, use_flex_attention=True, force_flex_attention=True)


def should_force_flex_attention() -> bool:
    """The flag that was set."""
    return NattenContext.force_flex_attention


use_fna = use_fused_na
is_fna_enabled = is_fused_na_enabled


@dataclasses.dataclass
class AutotunerFlags:
    """What `use_autotuner` was told."""

    forward_pass: bool = False
    backward_pass: bool = False
    thorough_mode_forward: bool = False
    thorough_mode_backward: bool = False
    warmup_steps_forward: int = 5
    warmup_steps_backward: int = 5
    steps_forward: int = 5
    steps_backward: int = 5


class AutotunerContext:
    """The state of the switches of 0.17's tuner."""

    flags: ClassVar[AutotunerFlags] = AutotunerFlags()

    @staticmethod
    def reset() -> None:
        """Set every switch to what NATTEN begins with."""
        AutotunerContext.flags = AutotunerFlags()


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """Keep the flags; there is nothing to tune, our tile sizes come from a cost model. None leaves one as it is."""
    told = {name: value for name, value in locals().items() if value is not None}
    AutotunerContext.flags = dataclasses.replace(AutotunerContext.flags, **told)


def disable_autotuner() -> None:
    """All flags off."""
    use_autotuner(False, False, False, False)


def is_autotuner_enabled() -> bool:
    """Whether the tuner was asked for, for either direction."""
    return is_autotuner_enabled_for_forward() or is_autotuner_enabled_for_backward()


def is_autotuner_enabled_for_forward() -> bool:
    """The flag that was set."""
    return AutotunerContext.flags.forward_pass


def is_autotuner_enabled_for_backward() -> bool:
    """The flag that was set."""
    return AutotunerContext.flags.backward_pass


def is_autotuner_thorough_for_forward() -> bool:
    """The flag that was set."""
    return AutotunerContext.flags.thorough_mode_forward


def is_autotuner_thorough_for_backward() -> bool:
    """The flag that was set."""
    return AutotunerContext.flags.thorough_mode_backward


def has_cuda() -> bool:
    """Whether neighborhood attention can run on a CUDA device here: wherever torch finds one."""
    return torch.cuda.is_available()


def has_half(device_index: Any = None) -> bool:
    """Whether it can run there in float16: our operator takes it on every device."""
    del device_index
    return has_cuda()


def has_bfloat(device_index: Any = None) -> bool:
    """Whether it can run there in bfloat16: our operator takes it on every device."""
    del device_index
    return has_cuda()


def has_fna(device_index: Any = None) -> bool:
    """Whether the fused functions can be used: always, also without a GPU."""
    del device_index
    return True


has_fused_na = has_fna


def has_gemm(device_index: Any = None) -> bool:
    """Whether NATTEN's GEMM kernels are there: no."""
    del device_index
    return False


has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_gemm


def use_tf32_in_gemm_na(mode: bool = True) -> None:
    """Keep a flag; torch's own (`torch.backends.cuda.matmul.allow_tf32`) is the one that counts."""
    NattenContext.tf32_in_gemm_na = bool(mode)


def is_tf32_in_gemm_na_enabled() -> bool:
    """The flag that was set."""
    return NattenContext.tf32_in_gemm_na


def use_tiled_na(mode: bool = True) -> None:
    """Keep a flag; it was about NATTEN's kernels."""
    NattenContext.tiled_na = bool(mode)


def is_tiled_na_enabled() -> bool:
    """The flag that was set."""
    return NattenContext.tiled_na


def use_gemm_na(mode: bool = True) -> None:
    """Keep a flag; it was about NATTEN's kernels."""
    NattenContext.gemm_na = bool(mode)


def is_gemm_na_enabled() -> bool:
    """The flag that was set."""
    return NattenContext.gemm_na


def enable_tf32() -> bool:
    """Set the flag and return it, as until 0.17."""
    use_tf32_in_gemm_na(True)
    return is_tf32_in_gemm_na_enabled()


def disable_tf32() -> bool:
    """Clear the flag and return it, as until 0.17."""
    use_tf32_in_gemm_na(False)
    return is_tf32_in_gemm_na_enabled()


def enable_gemm_na() -> bool:
    """Set the flag and return it, as until 0.17."""
    use_gemm_na(True)
    return is_gemm_na_enabled()


def disable_gemm_na() -> bool:
    """Clear the flag and return it, as until 0.17."""
    use_gemm_na(False)
    return is_gemm_na_enabled()


def enable_tiled_na() -> bool:
    """Set the flag and return it, as until 0.17."""
    use_tiled_na(True)
    return is_tiled_na_enabled()


def disable_tiled_na() -> bool:
    """Clear the flag and return it, as until 0.17."""
    use_tiled_na(False)
    return is_tiled_na_enabled()
