"""The registered operators: their schemas, fakes, gradients and costs.

`vicinal::attend` takes packed tables and the name of a back end, and knows no pattern. It is opaque to compilers
and exporters; what they need to know of it is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from vicinal.ops import backend
from vicinal.ops.backend import Call, Gradients, Inputs, gradients_through
from vicinal.ops.packing import Layout, ordinary_tensors
from vicinal.ops.side_by_side import is_plain

library = torch.library.Library("vicinal", "DEF")

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor tables, Tensor? bias, Tensor? extra_key, Tensor? extra_value, "
    "Tensor? extra_lengths"
)
below_autocast = torch._C._DisableAutocast
"""Around a kernel: torch's own compute in their own precisions under autocast, and so must ours, backward above all.

Casting belongs to the call. Without this autocast would reach into the operations that a kernel is made of.
"""

library.define(f"attend({_TENSORS}, int[] layout, float scale, str backend) -> (Tensor, Tensor)")
library.define(
    f"attend_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_TENSORS}, int[] layout, "
    "float scale, str backend, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _inputs(tensors: Sequence[torch.Tensor | None], layout: Sequence[int], scale: float) -> Inputs:
    query, key, value, tables, bias, extra_key, extra_value, extra_lengths = tensors
    assert query is not None
    assert key is not None
    assert value is not None
    assert tables is not None
    return Inputs(query, key, value, tables, bias, extra_key, extra_value, extra_lengths, Layout.unpack(layout), scale)


def _attend_now(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *tensors, layout, scale, name = arguments
    return backend.find(name).forward(_inputs(tensors, layout, scale))


def _attend(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with below_autocast():
        return _attend_now(*arguments)


def attend_plain(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`vicinal::attend` in plain ATen operations, for programs that must run without this library."""
    *tensors, layout, scale, name = arguments
    return backend.find(name).differentiable(_inputs(tensors, layout, scale))


def _attend_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, _, value = arguments[:3]
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    return out, lse


def _attend_backward(
    grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    *tensors, layout, scale, name, needs = rest
    inputs = _inputs(tensors, layout, scale)
    with below_autocast():
        found = backend.find(name).backward(inputs, out, lse, grad_out, grad_lse, needs)
    return tuple(inputs.query.new_empty(0) if grad is None else grad.contiguous() for grad in found)


def _attend_backward_fake(
    grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    del grad_out, grad_lse, out, lse
    tensors, needs = rest[:8], rest[-1]
    wanted = (*tensors[:3], *tensors[4:7])
    return tuple(
        tensors[0].new_empty(0) if tensor is None or not need else tensor.new_empty(tensor.shape)
        for tensor, need in zip(wanted, needs, strict=True)
    )


class _Attend(torch.autograd.Function):
    """Autograd's view of `vicinal::attend`.

    Written out rather than left to `torch.library.register_autograd`, whose wrapper spends more time on a call's
    default arguments than a small problem takes. Without a keyset the dispatcher was left out.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *tensors, ctx.layout, ctx.scale, ctx.backend = arguments
        keeping = backend.find(ctx.backend).keeping
        kept: tuple[torch.Tensor, ...] = ()
        if keeping is not None and (keyset is None or _is_plain(keyset)):
            with below_autocast(), torch._C._AutoDispatchBelowAutograd():
                out, lse, kept = keeping.forward(_inputs(tensors, ctx.layout, ctx.scale))
        else:
            out, lse = _below_autograd(keyset, arguments)
        ctx.save_for_backward(*tensors, out, lse, *kept)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        grad_out, grad_lse = grads
        return (None, *_differentiate(ctx, grad_out, grad_lse))


_IS_PLAIN: dict[int, bool] = {}
"""For a set of dispatch keys, whether a kernel for the CPU is all that is left below autograd."""


def _is_plain(keyset: Any) -> bool:
    raw = keyset.raw_repr()
    known = _IS_PLAIN.get(raw)
    if known is None:
        below = keyset & torch._C._after_ADInplaceOrView_keyset
        known = _IS_PLAIN[raw] = below.highestPriorityTypeId() == torch._C.DispatchKey.CPU
    return known


def _below_autograd(keyset: Any, arguments: tuple[Any, ...]) -> Any:
    if keyset is None or _is_plain(keyset):
        # nothing stands between here and the kernel, neither a mode nor a subclass: a trip through the dispatcher
        # would only turn all arguments into C++ values and back, which takes longer than a tiny problem
        if arguments[-1] == "cpu":  # calls no operation of torch that autograd or autocast could reach into
            return _attend_now(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return _attend(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        attend = torch.ops.vicinal.attend.default
        return attend.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _has_tangent(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _attend_autograd(keyset: Any, *arguments: Any) -> Any:
    if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments[:8])):
        raise NotImplementedError(
            "vicinal.attention has no forward-mode derivatives; use backward() or torch.autograd.grad"
        )
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return _Attend.apply(keyset, *arguments)
    return _below_autograd(keyset, arguments)


_NOBODY_WATCHES = {
    keys.raw_repr()
    for plain in (torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect),)
    for keys in (plain, plain | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView))
}
"""What the dispatcher adds to every call where no mode and no transform is active, in inference mode and out of it."""


def _is_quiet(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether neither the thread's dispatch keys nor the tensors' ask for anything but autograd and a kernel."""
    return torch._C._dispatch_tls_local_include_set().raw_repr() in _NOBODY_WATCHES and all(
        tensor is None or _is_plain(torch._C._dispatch_keys(tensor)) for tensor in tensors
    )


keys_of = torch._C._dispatch_keys

with ordinary_tensors():
    PLAIN_KEYS = keys_of(torch.empty(0, device="cpu")).raw_repr()
    """The dispatch keys of an ordinary tensor on the CPU."""

_function_modes = torch._C._len_torch_function_stack
_is_profiling = torch._C._autograd._profiler_enabled


def is_watched() -> bool:
    """Whether somebody watches calls in a way that dispatch keys do not tell."""
    return bool(_function_modes() or _is_profiling() or forward_ad._current_level >= 0)


def may_record() -> bool:
    """Whether autograd looks on where gradients are enabled: neither inference mode nor a guard shuts it off."""
    return not torch._C._dispatch_tls_local_exclude_set().has(torch._C.DispatchKey.AutogradOther)


def attend(*arguments: Any, wants_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`vicinal::attend`; where nobody watches the operations, without the dispatcher, which takes longer than we do.

    The tensors are plain ones, and autocast is off. A log-sum-exp that is not wanted may be left out.
    """
    tensors = arguments[:8]
    results: tuple[torch.Tensor, torch.Tensor]
    if is_watched() or not _is_quiet(tensors):
        results = torch.ops.vicinal.attend.default(*arguments)
    elif (
        torch.is_grad_enabled()
        and may_record()
        and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    ):
        results = _Attend.apply(None, *arguments)
    else:
        alone = None if wants_lse else backend.find(arguments[-1]).output_alone
        if alone is not None:
            with below_autocast(), torch._C._AutoDispatchBelowAutograd():
                return alone(_inputs(tensors, *arguments[8:10])), None
        results = _below_autograd(None, arguments)
    return results


def known(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Any, ready: Ready) -> Call:
    """The way for calls like this one, checked, without extra tokens, while the thread's dispatch keys are the same."""
    tables, layout, scale, name = ready

    def call(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, wants_lse: bool
    ) -> Any:
        vector = None if bias is None else bias.reshape(-1)
        results = attend(query, key, value, tables, vector, None, None, None, layout, scale, name, wants_lse=wants_lse)
        return results if wants_lse else results[0]

    prepare = backend.find(name).prepare
    if prepare is None or not _is_quiet((query, key, value, bias)):
        return call
    inputs = Inputs(query, key, value, tables, bias, None, None, None, Layout.unpack(layout), scale)
    return prepare(inputs, call) or call


Ready = tuple[torch.Tensor, tuple[int, ...], float, str]
"""Tables, packed layout, scale and name of the back end."""


def is_here(tensor: torch.Tensor) -> bool:
    """Whether the kernels for the CPU may be called on a tensor without a detour: it is plain and holds its numbers.

    A lazily negated tensor does not, nor does a sparse one.
    """
    return tensor.device.type == "cpu" and is_plain(tensor) and _is_plain(torch._C._dispatch_keys(tensor))


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Gradients:
    saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[position] for position in (1, 2, 3, 5, 6, 7)]  # 0 is the keyset
    query, key, value, bias, extra_key, extra_value = differentiate(
        (*saved[:8], ctx.layout, ctx.scale, ctx.backend), saved[8:10], saved[10:], (grad_out, grad_lse), needs
    )
    return (query, key, value, None, bias, extra_key, extra_value, None, None, None, None)


def differentiate(
    arguments: Sequence[Any],
    results: tuple[torch.Tensor, torch.Tensor],
    kept: Sequence[torch.Tensor],
    grads: tuple[torch.Tensor | None, torch.Tensor | None],
    needs: Sequence[bool],
) -> Gradients:
    """The gradients that are needed of `vicinal::attend`, from its arguments, its results and their gradients."""
    *tensors, layout, scale, name = arguments
    found: Gradients
    if grads[0] is None and grads[1] is None:
        found = (None,) * 6
    elif torch.is_grad_enabled():  # create_graph: only plain torch operations can be differentiated again
        inputs = _inputs(tensors, layout, scale)
        with below_autocast():
            found = gradients_through(backend.find(name).differentiable, inputs, *grads, needs, create_graph=True)
    elif all(is_here(tensor) for tensor in (results[1], *grads) if tensor is not None):
        # as in the forward, and the gradients may share memory, which those of a registered operator must not
        inputs = _inputs(tensors, layout, scale)
        with below_autocast(), torch._C._AutoDispatchBelowAutograd():
            used = backend.find(name)
            if kept and used.keeping is not None:
                found = used.keeping.backward(inputs, kept, *grads, needs)
            else:
                found = used.backward(inputs, *results, *grads, needs)
    else:
        packed = torch.ops.vicinal.attend_backward(*grads, *results, *tensors, layout, scale, name, needs)
        found = tuple(grad if need else None for grad, need in zip(packed, needs, strict=True))
    return found


library.impl("attend", _attend, "CompositeExplicitAutograd")
library.impl("attend_backward", _attend_backward, "CompositeExplicitAutograd")
torch.library.register_fake("vicinal::attend", _attend_fake, lib=library)
torch.library.register_fake("vicinal::attend_backward", _attend_backward_fake, lib=library)
library.impl("attend", _attend_autograd, "Autograd", with_keyset=True)
