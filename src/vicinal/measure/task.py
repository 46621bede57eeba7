"""A problem with its tensors, and contenders that are ready to run it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch

from vicinal.measure.problems import Problem

Tensors = tuple[torch.Tensor, ...]


class NotRun(Exception):
    """A contender cannot take the problem; the message says why. It is an answer, not a failure."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a contender likes its tensors. Converting is never timed.

    `enter` makes its inputs from query, key and value `[batch, *grid, heads, head_dim]`, and `leave_inputs` brings
    their gradients back; `enter_out` and `leave_out` do so for the output.
    """

    name: str
    enter: Callable[[Sequence[torch.Tensor]], Tensors]
    leave_inputs: Callable[[Sequence[torch.Tensor]], Tensors]
    enter_out: Callable[[torch.Tensor], torch.Tensor]
    leave_out: Callable[[torch.Tensor], torch.Tensor]


def each(
    name: str, enter: Callable[[torch.Tensor], torch.Tensor], leave: Callable[[torch.Tensor], torch.Tensor]
) -> Layout:
    """A layout that treats query, key, value and output alike, one by one."""
    return Layout(
        name,
        lambda tensors: tuple(enter(tensor).contiguous() for tensor in tensors),
        lambda tensors: tuple(map(leave, tensors)),
        lambda tensor: enter(tensor).contiguous(),
        leave,
    )


HEADS_LAST = each("[batch, *grid, heads, head_dim]", lambda tensor: tensor, lambda tensor: tensor)
HEADS_FIRST = each(
    "[batch, heads, *grid, head_dim]", lambda tensor: tensor.movedim(-2, 1), lambda tensor: tensor.movedim(1, -2)
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A contender made for one task: what to call, in which layout, and a word on how (a tile size, say)."""

    call: Callable[..., torch.Tensor]
    layout: Layout = HEADS_LAST
    detail: str = ""


class Task:
    """A problem in one dtype on one device, forward alone or with the backward, and its random tensors.

    >>> from vicinal.measure.problems import find
    >>> task = Task(find(["nat-14x14"])[0], torch.float32, backward=True)
    >>> task.query.shape, task.grad_out.shape
    (torch.Size([1, 14, 14, 8, 32]), torch.Size([1, 14, 14, 8, 32]))
    """

    def __init__(
        self, problem: Problem, dtype: torch.dtype, *, backward: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        self.problem, self.dtype, self.backward, self.device = problem, dtype, backward, torch.device(device)
        # a video's tensors would take a CPU longer to draw than a GPU takes for everything else
        place = self.device if self.device.type == "cuda" else torch.device("cpu")
        generator = torch.Generator(place).manual_seed(0)
        self.query, self.key, self.value, self.grad_out = (
            torch.randn(problem.shape, generator=generator, device=place).to(self.device, dtype) for _ in range(4)
        )
        self._entered: dict[str, tuple[Tensors, torch.Tensor]] = {}

    def forward_only(self) -> Task:
        """The same task without the backward, on the same tensors."""
        other = copy.copy(self)
        other.backward = False
        return other

    @property
    def direction(self) -> str:
        """What is measured, in a word."""
        return "forward+backward" if self.backward else "forward"

    def entered(self, layout: Layout) -> tuple[Tensors, torch.Tensor]:
        """The inputs in a layout, and the gradient of the output; made once."""
        if layout.name not in self._entered:
            inputs = layout.enter((self.query, self.key, self.value))
            self._entered[layout.name] = (inputs, layout.enter_out(self.grad_out))
        return self._entered[layout.name]

    def runner(self, prepared: Prepared) -> Callable[[], Tensors]:
        """What is timed: a call that returns the output, and with the backward the gradients of the inputs."""
        inputs, grad_out = self.entered(prepared.layout)
        call = prepared.call
        if not self.backward:

            def forward() -> Tensors:
                with torch.no_grad():
                    return (call(*inputs),)

            return forward
        leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)

        def forward_backward() -> Tensors:
            out = call(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))

        return forward_backward

    def answer(self, prepared: Prepared) -> Tensors:
        """Output (and gradients of query, key and value), all `[batch, *grid, heads, head_dim]`."""
        out, *gradients = self.runner(prepared)()
        return (prepared.layout.leave_out(out), *(prepared.layout.leave_inputs(gradients) if gradients else ()))
