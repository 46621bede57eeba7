"""A task in training: what one step does, what an evaluation does, and the state that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint as recompute

from vicinal.data.batch import Batch
from vicinal.data.stream import Stream
from vicinal.tasks.protocol import Moment, Task, Turn
from vicinal.training.average import Average
from vicinal.training.optimizer import make_optimizer, set_rate
from vicinal.training.recipe import Recipe
from vicinal.training.world import World, clip, replicate, shard

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """A task with its optimizers, spread over the processes of a world.

    Nothing random is remembered from step to step: what a step draws follows from the run's seed, the step, the
    process and the piece. So a checkpoint needs no generator's state, and a resumed run is the same run.
    """

    def __init__(self, recipe: Recipe, task: Task, world: World, steps_per_epoch: int) -> None:
        self.recipe, self.task, self.world, self.loop = recipe, task, world, recipe.loop
        self.steps_per_epoch = steps_per_epoch
        self.total = max(1, round(self.loop.epochs * steps_per_epoch))
        self.step = 0
        for turn in task.turns:
            turn.objective.to(world.device)
        if self.loop.activation_checkpointing:
            for unit in task.units():
                recomputed(unit)
        shard(task, world, self.loop.parallel)
        if self.loop.compile:
            for turn in task.turns:
                turn.objective.compile()
        self.called = replicate(task.turns, world, self.loop.parallel)
        self.optimizers = self._optimizers()
        self.average: Average | None = None
        self.restart_average()
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.loop.precision == "float16")

    def _optimizers(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """Each optimizer with the first objective that uses it."""
        made: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
        for turn in self.task.turns:
            if turn.optimizer not in self.recipe.optimizers:
                raise ValueError(
                    f"the task's turn {turn.name!r} needs an optimizer {turn.optimizer!r}; the recipe has "
                    f"{', '.join(self.recipe.optimizers)}"
                )
            if turn.optimizer not in made:
                config = self.recipe.optimizers[turn.optimizer]
                made[turn.optimizer] = (turn.objective, make_optimizer(turn.objective, config))
        return made

    def take_step(self, pieces: Sequence[Batch]) -> tuple[dict[str, torch.Tensor], float]:
        """One step over this process's pieces of a batch; returns its mean losses and the largest learning rate."""
        moment = Moment(self.step, self.total, self.loop.seed)
        epoch, epochs = self.step / self.steps_per_epoch, self.total / self.steps_per_epoch
        factor, rate = self.recipe.schedule.factor(epoch, epochs), 0.0
        losses: dict[str, torch.Tensor] = {}
        for turn, called in zip(self.task.turns, self.called, strict=True):
            if self.step % turn.every:
                continue
            optimizer = self.optimizers[turn.optimizer][1]
            rate = max(rate, set_rate(optimizer, factor))
            optimizer.zero_grad(set_to_none=True)
            for number, piece in enumerate(pieces):
                named = self._gradients(called, piece, moment, number, len(pieces))
                losses.update({name: losses[name] + part if number else part for name, part in named.items()})
            self._move(turn, optimizer)
        if self.average is not None:
            self.average.update(self.step)
        self.task.after_step(moment)
        self.step += 1
        return losses, rate

    def _gradients(
        self, called: nn.Module, piece: Batch, moment: Moment, number: int, pieces: int
    ) -> dict[str, torch.Tensor]:
        torch.manual_seed(self._seed(number))
        with self._synchronized(called, number == pieces - 1):
            with self.autocast():
                total, named = called(piece.to(self.world.device), moment)
            self.scaler.scale(total / pieces).backward()
        return {name: part / pieces for name, part in named.items()}

    def _seed(self, piece: int) -> int:
        return hash((self.loop.seed, self.step, self.world.rank, piece)) & (2**63 - 1)

    def _synchronized(self, called: nn.Module, is_last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged over processes with the last piece alone."""
        if isinstance(called, nn.parallel.DistributedDataParallel):
            return nullcontext() if is_last else called.no_sync()
        if isinstance(self.task.model, FSDPModule):
            self.task.model.set_requires_gradient_sync(is_last)
        return nullcontext()

    def _move(self, turn: Turn, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)
        if self.loop.clip_norm is not None and turn.is_clipped:
            clip([parameter for group in optimizer.param_groups for parameter in group["params"]], self.loop.clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the recipe."""
        if self.loop.precision == "float32":
            return nullcontext()
        return torch.autocast(self.world.device.type, _DTYPES[self.loop.precision])

    def evaluate(self, stream: Stream, limit: int | None = None) -> dict[str, float]:
        """The task's metrics on a stream, of the averaged weights where there are some."""
        with self.averaged(), self.autocast():
            evaluation = self.task.evaluation()
            for number, batch in enumerate(stream.evaluation()):
                if limit is not None and number == limit:
                    break
                evaluation.add(batch.to(self.world.device))
            return evaluation.values()

    def averaged(self) -> AbstractContextManager[None]:
        """The model in evaluation mode, with the averaged weights where there are some."""
        stack = ExitStack()
        modules = [turn.objective for turn in self.task.turns]
        for module in modules:
            module.eval()
            stack.callback(module.train)
        if self.average is not None:
            stack.enter_context(self.average.applied())
        return _Left(stack)

    def restart_average(self) -> None:
        """Begin the average anew at the weights as they are now."""
        if self.loop.ema_decay is not None:
            self.average = Average(self.task.model, self.loop.ema_decay)

    def tensors(self) -> dict[str, Any]:
        """All that a checkpoint holds, as it is spread over the processes."""
        held: dict[str, Any] = {"model": self.task.model.state_dict()}
        for name, (objective, optimizer) in self.optimizers.items():
            held[f"optimizer.{name}"] = get_optimizer_state_dict(objective, optimizer)
        if self.average is not None:
            held["average"] = self.average.values
        return held

    def facts(self) -> dict[str, Any]:
        """What stands beside the tensors."""
        return {"step": self.step, "total": self.total, "scaler": self.scaler.state_dict()}

    def take_over(self, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Go on from a checkpoint; `tensors` are those of `tensors()`, filled."""
        self.task.model.load_state_dict(tensors["model"])
        for name, (objective, optimizer) in self.optimizers.items():
            set_optimizer_state_dict(objective, optimizer, tensors[f"optimizer.{name}"])
        if self.average is not None:
            self.average.values = tensors["average"]
        self.scaler.load_state_dict(facts["scaler"])
        self.step = int(facts["step"])

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The model's weights in one piece, averaged where there is an average; on the first process."""
        with self.averaged():
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights: dict[str, Any] = get_model_state_dict(self.task.model, options=options)
            return {name: tensor.detach().clone() for name, tensor in weights.items()}


class _Left(AbstractContextManager[None]):
    """A stack that was filled before it is entered."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def __exit__(self, *details: Any) -> None:
        self.stack.close()


def recomputed(unit: nn.Module) -> None:
    """Make a module keep nothing for its backward, which runs it again.

    >>> layer = torch.nn.Linear(2, 2)
    >>> recomputed(layer)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> layer.weight.grad.shape
    torch.Size([2, 2])
    """
    forward = unit.forward

    def again(*inputs: Any) -> Any:
        return recompute(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)

    unit.forward = again  # the names of parameters stay, unlike with a wrapper
