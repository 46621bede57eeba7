"""What a back end is: a name, what it can do as data, and the functions that do it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vicinal.ops.packing import Layout
from vicinal.pattern.axis import Near


class BackendRefused(RuntimeError):
    """A back end that was asked for by name cannot take this problem; the message lists every reason."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything a back end may decide by: sizes, kinds and features, no tensors."""

    device: str
    dtype: torch.dtype
    grid: tuple[int, ...]
    key_grid: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    has_bias: bool = False
    has_extra_keys: bool = False
    has_extra_lengths: bool = False
    has_grids: bool = False
    num_groups: int = 1
    num_members: int = 1
    needs_double_backward: bool = False
    neighborhood: tuple[Near, ...] | None = None
    """One `Near` per axis where that is what the tables are, whatever pattern they were made from."""


@dataclasses.dataclass(frozen=True)
class Capability:
    """What a back end can do. An empty tuple of devices or dtypes means any."""

    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    max_head_dim: int | None = None
    max_tokens: int | None = None
    lacks: frozenset[str] = frozenset()
    """Features of `Problem` (its boolean fields, or "groups", "members") that it does not have."""

    def refusals(self, problem: Problem) -> list[str]:
        """All reasons why the back end cannot take the problem; none means it can."""
        reasons = []
        if self.devices and problem.device not in self.devices:
            reasons.append(f"runs on {' or '.join(self.devices)}, the tensors are on {problem.device}")
        if self.dtypes and problem.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            reasons.append(f"takes {names}, the tensors are {str(problem.dtype).removeprefix('torch.')}")
        if self.max_head_dim is not None and max(problem.head_dim, problem.value_dim) > self.max_head_dim:
            reasons.append(f"takes head dims up to {self.max_head_dim}")
        tokens = _product(problem.grid) * _product(problem.key_grid)
        if self.max_tokens is not None and tokens > self.max_tokens**2:
            reasons.append(f"writes out the dense mask, at most {self.max_tokens} queries by {self.max_tokens} keys")
        for feature, words in _FEATURES.items():
            if feature in self.lacks and _has(problem, feature):
                reasons.append(f"does not support {words}")
        return reasons


_FEATURES = {
    "has_bias": "a position bias",
    "has_extra_keys": "extra keys",
    "has_extra_lengths": "extra_lengths",
    "has_grids": "grids (padded batches)",
    "groups": "per-head patterns",
    "members": "unions",
}


def _has(problem: Problem, feature: str) -> bool:
    if feature == "groups":
        return problem.num_groups > 1
    if feature == "members":
        return problem.num_members > 1
    return bool(getattr(problem, feature))


def _product(lengths: Sequence[int]) -> int:
    product = 1
    for length in lengths:
        product *= length
    return product


@dataclasses.dataclass(eq=False, slots=True)  # frozen ones take twice as long to make, at every call
class Inputs:
    """The tensors of one attention call, as the registered operator gets them.

    `query` `[batch, *grid, heads, head_dim]`, `key` and `value` `[batch, *key_grid, kv_heads, ...]`, `tables` and
    `layout` from `packing`, `bias` all groups' tables in one vector, `extra_key` and `extra_value`
    `[batch, tokens, kv_heads, ...]`, `extra_lengths` int64 `[batch]`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    tables: torch.Tensor
    bias: torch.Tensor | None
    extra_key: torch.Tensor | None
    extra_value: torch.Tensor | None
    extra_lengths: torch.Tensor | None
    layout: Layout
    scale: float

    @property
    def grid(self) -> tuple[int, ...]:
        """The query grid."""
        return tuple(self.query.shape[1:-2])

    @property
    def key_grid(self) -> tuple[int, ...]:
        """The key grid."""
        return tuple(self.key.shape[1:-2])

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors that may take a gradient, in the order of `Gradients`."""
        return (self.query, self.key, self.value, self.bias, self.extra_key, self.extra_value)


Gradients = tuple[torch.Tensor | None, ...]
"""Gradients of query, key, value, bias, extra_key, extra_value; None where not asked for."""

Forward = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]
Backward = Callable[
    [Inputs, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, Sequence[bool]], Gradients
]


@dataclasses.dataclass(frozen=True)
class Keeping:
    """A forward that keeps tensors for the backward, and the backward that takes them.

    `forward` returns the output, the log-sum-exp and what it keeps; nothing, an empty tuple, for problems of which it
    keeps nothing, whose gradients are then the business of `Backend.backward`. `backward` takes the inputs, what was
    kept, the gradients of both results (either may be None), and which gradients are needed.
    """

    forward: Callable[[Inputs], tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]]
    backward: Callable[
        [Inputs, Sequence[torch.Tensor], torch.Tensor | None, torch.Tensor | None, Sequence[bool]], Gradients
    ]


Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any, bool], Any]
"""A call like one before: query, key, value, bias, and whether the log-sum-exp is to be returned too."""


def _nothing_missing() -> str | None:
    return None


def _always(problem: Problem) -> bool:
    del problem
    return True


def _never(problem: Problem) -> bool:
    del problem
    return False


def _nothing_refused(problem: Problem) -> list[str]:
    del problem
    return []


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    `forward` returns the output and the log-sum-exp. `backward` takes the inputs, these two, and their
    gradients (either may be None), and which gradients are needed. `differentiable` is a forward made of
    plain torch operations that autograd can go through twice. `describe` tells `explain` how the
    problem would be cut up. `reason_missing` tells why this installation or machine lacks what the back end
    needs, None where it has it; it is first asked when a call comes. `further_refusals` tells what no
    `Capability` can. A back end that can, but does not lead (`leads`), is tried after our own kernels for the GPU, and
    one that is there `only_by_name` never. An engine (`is_engine`) hands problems to somebody else's kernels. `plan`
    looks at the bounds (None where samples differ and the padded grid takes no pattern) before a call and may leave
    integers in its layout. `prepare` makes a shorter way for calls like one without extra tokens that nobody watches,
    from its inputs (the bias as it was given) and the way for the times when somebody does; None where it has no such
    way. With `keeping` a call that autograd watches may keep what its backward would compute again;
    `output_alone` leaves the log-sum-exp out, for calls that want neither that nor gradients.
    """

    name: str
    capability: Capability
    forward: Forward
    backward: Backward
    differentiable: Forward
    describe: Callable[[Problem, Any, Layout], dict[str, Any]]
    reason_missing: Callable[[], str | None] = _nothing_missing
    further_refusals: Callable[[Problem], list[str]] = _nothing_refused
    leads: Callable[[Problem], bool] = _always
    only_by_name: Callable[[Problem], bool] = _never
    is_engine: bool = False
    plan: Callable[[Problem, Any], tuple[int, ...]] | None = None
    keeping: Keeping | None = None
    prepare: Callable[[Inputs, Call], Call | None] | None = None
    output_alone: Callable[[Inputs], torch.Tensor] | None = None

    def refusals(self, problem: Problem) -> list[str]:
        """All reasons why the back end cannot take the problem; none means it can."""
        reasons = [*self.capability.refusals(problem), *self.further_refusals(problem)]
        missing = self.reason_missing()
        return reasons if missing is None else [*reasons, missing]


_BACKENDS: dict[str, Backend] = {}


PREFERENCE = ("natten", "triton", "cpu", "flex", "tiled", "reference")
"""All names a back end may have, in the order in which the automatic choice tries them."""


def register(backend: Backend) -> None:
    """Make a back end known."""
    assert backend.name in PREFERENCE
    _BACKENDS[backend.name] = backend


def known(*, with_engines: bool = False) -> tuple[str, ...]:
    """Names of our own back ends of this installation, in the order of preference; those of engines too if asked."""
    return tuple(name for name in PREFERENCE if name in _BACKENDS and (with_engines or not _BACKENDS[name].is_engine))


def usable() -> tuple[str, ...]:
    """Names of the back ends that take an ordinary problem on some device of this machine."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    plain = [Problem(device, torch.float32, (8, 8), (8, 8), 1, 1, 32, 32) for device in devices]
    return tuple(name for name in known() if any(not _BACKENDS[name].refusals(problem) for problem in plain))


def find(name: str) -> Backend:
    """The back end of that name."""
    return _BACKENDS[name]


def refusals(problem: Problem) -> dict[str, list[str]]:
    """For every name all reasons why that back end cannot take the problem."""
    missing = ["is not part of this version of vicinal"]
    return {name: _BACKENDS[name].refusals(problem) if name in _BACKENDS else list(missing) for name in PREFERENCE}


def preference(problem: Problem, able: Sequence[str]) -> list[str]:
    """The names of those able to take a problem, in the order in which the automatic choice wants them."""
    able = [name for name in able if not _BACKENDS[name].only_by_name(problem)]
    waits = [name for name in able if not _BACKENDS[name].leads(problem)]
    before_triton = PREFERENCE[: PREFERENCE.index("triton") + 1]
    first = [name for name in able if name in before_triton and name not in waits]
    return [*first, *waits, *(name for name in able if name not in first and name not in waits)]


def check_name(name: Any) -> None:
    """Raise `ValueError` unless `name` is None or the name of a back end, present or planned."""
    if name is not None and name not in PREFERENCE:
        raise ValueError(f"backend must be None or one of {', '.join(PREFERENCE)}, got {name!r}")


def choose(problem: Problem, name: str | None) -> str:
    """The back end to use: the one asked for, or the first that can.

    >>> choose(Problem("cpu", torch.float32, (8, 8), (8, 8), 2, 2, 32, 32), "tiled")
    'tiled'
    """
    reasons = refusals(problem)
    if name is None:
        able = preference(problem, [name for name in PREFERENCE if not reasons[name]])
        if not able:
            raise BackendRefused(f"no back end can take this problem: {_listed(reasons)}")
        if able[0] == "tiled" and problem.device == "cpu":
            _warn_of_slow_path()
        return able[0]
    check_name(name)
    if reasons[name]:
        raise BackendRefused(f"backend {name!r} cannot take this problem: {_listed({name: reasons[name]})}")
    return name


@functools.cache
def _warn_of_slow_path() -> None:
    """Say once that CPU calls take the portable path because the compiled kernels are not there."""
    missing = _BACKENDS["cpu"].reason_missing() if "cpu" in _BACKENDS else None
    if missing is not None:
        warnings.warn(
            f"vicinal runs on the CPU without its compiled kernels, many times slower: {missing}. "
            "Install a C++ compiler and then vicinal again.",
            stacklevel=2,
        )


def _listed(reasons: dict[str, list[str]]) -> str:
    return "; ".join(f"{name} {reason}" for name, some in reasons.items() for reason in some)


def gradients_through(
    differentiable: Forward,
    inputs: Inputs,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    needs: Sequence[bool],
    *,
    create_graph: bool,
) -> Gradients:
    """Run a differentiable forward again and let autograd take its gradients."""
    # a compiled program may run an operator's kernel with autograd shut off, where enable_grad alone records nothing
    recording = contextlib.nullcontext() if create_graph else torch.inference_mode(False)
    with recording, torch.enable_grad():
        # an alias each, so that one tensor given twice (as query and as key, say) still gets two gradients
        aliases: list[torch.Tensor | None] = []
        for tensor, need in zip(inputs.tensors(), needs, strict=True):
            if tensor is None or not need:
                aliases.append(tensor)
            elif create_graph:
                aliases.append(tensor.view_as(tensor))
            else:
                aliases.append(tensor.detach().requires_grad_())
        query, key, value, bias, extra_key, extra_value = aliases
        assert query is not None
        assert key is not None
        assert value is not None
        alias = dataclasses.replace(
            inputs, query=query, key=key, value=value, bias=bias, extra_key=extra_key, extra_value=extra_value
        )
        results = zip(differentiable(alias), (grad_out, grad_lse), strict=True)
        pairs = [(result, grad) for result, grad in results if grad is not None and result.requires_grad]
        wanted = [alias for alias, need in zip(aliases, needs, strict=True) if alias is not None and need]
        grads: list[torch.Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            outputs, grad_outputs = zip(*pairs, strict=True)
            grads = list(
                torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True, create_graph=create_graph)
            )
    stream = iter(grads)
    found: list[torch.Tensor | None] = []
    for alias_tensor, need in zip(aliases, needs, strict=True):
        if alias_tensor is None or not need:
            found.append(None)
        else:
            grad = next(stream)
            found.append(torch.zeros_like(alias_tensor) if grad is None else grad)
    return tuple(found)
