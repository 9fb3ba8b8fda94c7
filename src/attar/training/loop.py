"""The one training loop, on Accelerate: any device, one process or many."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from attar.data.base import Batch, Data
from attar.errors import CheckpointError, TrainingError
from attar.events import Listener, silent
from attar.models.weights import load_weights
from attar.tasks.base import Task
from attar.training.checkpoint import load_checkpoint_state, save_checkpoint
from attar.training.config import Optimizer, Training
from attar.training.evaluation import statistics_of, to_device
from attar.training.gradients import term_norms
from attar.training.objective import Objective
from attar.training.precision import autocast
from attar.training.schedules import rate_factor

Hook = Callable[[nn.Module], None]
PROGRESS_EVERY = 0.5  # seconds between live progress events


class Step(nn.Module):
    """A network and its objective as one module, so that adapters and network are synchronised
    across processes alike, while the network itself stays unwrapped for hooks and paths."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.objective(self.network, batch)


def train(
    module: nn.Module,
    *,
    data: Data,
    task: Task,
    training: Training,
    objective: Objective,
    seed: int = 0,
    checkpoint: Path | None = None,
    before_step: Hook | None = None,
    after_step: Hook | None = None,
    tell: Listener = silent,
    label: str = "train",
    on_epoch: Callable[[nn.Module, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains `module` in place and returns its history, a dict an epoch.

    Each epoch's order, augmentation and dropout depend on (seed, label, epoch) alone, so a training
    that is killed and resumed from `checkpoint` ends with the same weights as an undisturbed one.
    Where the loss has several terms, an epoch's record has the norm of each one's gradient too, at
    one step in its middle (`gradients`).

    before_step, after_step: called with the module around every optimizer step, with gradients
        computed; they keep a student's constraints. on_epoch: called before each epoch.
    Raises `TrainingError` when the loss is no longer a number, `CheckpointError` for a checkpoint
    that is damaged or another training's.

    Example:
        >>> train(net, data=data, task=task, training=Training(epochs=2),
        ...       objective=TaskObjective(task))  # doctest: +SKIP
    """
    run = _Run(module, data, task, training, objective, seed, label)
    run.restore(checkpoint)
    for epoch in range(run.epoch, training.epochs):
        torch.manual_seed(_derived_seed(seed, label, epoch))
        if on_epoch is not None:
            on_epoch(module, epoch)
        started = time.perf_counter()
        objective.start_epoch(epoch, training.epochs)
        terms, norms = run.one_epoch(epoch, before_step, after_step, tell)
        run.finish_epoch(epoch, terms, norms, time.perf_counter() - started, after_step, tell)
        if checkpoint is not None and run.accelerator.is_main_process:
            save_checkpoint(run.state(), checkpoint)
    return run.hand_back()


class _Run:
    """The moving parts of one training."""

    def __init__(
        self,
        module: nn.Module,
        data: Data,
        task: Task,
        training: Training,
        objective: Objective,
        seed: int,
        label: str,
    ) -> None:
        self.module, self.data, self.task, self.training = module, data, task, training
        self.seed, self.label = seed, label
        self.history: list[dict[str, Any]] = []
        self.epoch = 0
        self.best: dict[str, Tensor] | None = None
        self.kept: dict[str, Tensor] = {}
        self.best_value = math.nan
        # Accelerate joins processes without a GPU only when it is told that there is none
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        if uses_convolutions(module):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = Step(module, objective)
        self.parameters = [p for p in step.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.parameters, training.optimizer, objective.undecayed())
        self.step, self.optimizer = self.accelerator.prepare(step, optimizer)
        self.objective = objective
        self.average = (
            AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(training.ema), use_buffers=True)
            if training.ema
            else None
        )
        self.steps = max(1, _count_steps(data, training))

    def batches(self, epoch: int) -> Iterator[Batch]:
        for batch in self.data.train.batches(
            self.training.batch_size,
            shuffle=True,
            augment=True,
            seed=augmentation_seed(self.seed, self.label),
            epoch=epoch,
            drop_last=len(self.data.train) > self.training.batch_size,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        ):
            yield to_device(batch, self.accelerator.device)

    def one_epoch(
        self, epoch: int, before: Hook | None, after: Hook | None, tell: Listener
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One pass; the mean of every loss term, and the norms of their gradients in its middle.
        Neither is read before it is shown: reading waits for the device."""
        self.step.train()
        totals: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        count, told = 0, time.perf_counter()
        for index, batch in enumerate(self.batches(epoch)):
            self._set_rate(epoch + min(1.0, (index + 0.5) / self.steps))
            with autocast(self.training.precision, self.accelerator.device):
                terms = self.step(batch)
                loss = torch.stack(tuple(terms.values())).sum()
            if index == self.steps // 2 and self._looks_at_gradients(terms):
                norms = term_norms(terms, [p for p in self.module.parameters() if p.requires_grad])
            self.accelerator.backward(loss)
            if before is not None:
                before(self.module)
            if self.training.clip is not None:
                self.accelerator.clip_grad_norm_(self.parameters, self.training.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if after is not None:
                after(self.module)
            if self.average is not None:
                self.average.update_parameters(self.module)
            for name, value in terms.items():
                totals[name] = totals.get(name, 0) + value.detach()
            count += 1
            if time.perf_counter() - told > PROGRESS_EVERY:
                told = time.perf_counter()
                self._progress(epoch, index, loss, tell)
        if not count:
            raise TrainingError(f"{self.label}: the training split gave no batch")
        everyone = self.accelerator.reduce(totals, reduction="mean")
        means = {name: float(total) / count for name, total in everyone.items()}
        self._require_finite(sum(means.values()), epoch)
        return means, {name: float(norm) for name, norm in norms.items()}

    def finish_epoch(
        self,
        epoch: int,
        terms: dict[str, float],
        norms: dict[str, float],
        seconds: float,
        after: Hook | None,
        tell: Listener,
    ) -> None:
        if self.average is not None and after is not None:
            after(self.average.module)  # a mean of networks that keep a promise may break it
        self._share_buffers()
        judged = self.objective.judged(self.candidate)
        value = self.task.value(statistics_of(judged, self.data.validation, self.task))
        better = self.best is None or self._improves(value)
        if better or self.training.keep == "last":
            self.best = _copied(self.candidate.state_dict())
            self.kept = _copied(self.objective.kept())
        if better:
            self.best_value = value
        self.epoch = epoch + 1
        remaining = (self.training.epochs - self.epoch) * seconds
        record = {
            "label": self.label,
            "epoch": self.epoch,
            "epochs": self.training.epochs,
            "loss": sum(terms.values()),
            "terms": terms,
            "metric": {
                "name": self.task.metric.name,
                "unit": self.task.metric.unit,
                "value": value,
            },
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "best": better,
        }
        if norms:
            finite = {name: n if math.isfinite(n) else None for name, n in norms.items()}
            record["gradients"] = finite
        self.history.append(record)
        tell({"event": "epoch", "eta_s": round(remaining, 1), **record})

    @property
    def candidate(self) -> nn.Module:
        """What is validated and kept: the average of the weights where one is made."""
        return self.average.module if self.average is not None else self.module

    def hand_back(self) -> list[dict[str, Any]]:
        """Puts the kept weights into the module and everything else away."""
        assert self.best is not None
        load_weights(self.module, self.best)
        self.objective.load_state_dict(self.kept, strict=False)
        self.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.module.zero_grad(set_to_none=True)
        self.module.eval()
        return self.history

    def state(self) -> dict[str, Any]:
        return {
            "training": self.training.model_dump(),
            "epoch": self.epoch,
            "step": self.accelerator.unwrap_model(self.step).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "best": self.best,
            "kept": self.kept,
            "best_value": self.best_value,
            "history": self.history,
        }

    def restore(self, checkpoint: Path | None) -> None:
        """Goes on where an earlier process stopped, if it left a checkpoint."""
        state = load_checkpoint_state(checkpoint) if checkpoint is not None else None
        if state is None:
            return
        try:
            if state["training"] != self.training.model_dump():
                raise ValueError("its settings differ")
            self.accelerator.unwrap_model(self.step).load_state_dict(state["step"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.epoch, self.best = state["epoch"], state["best"]
            self.kept = state.get("kept", {})
            self.best_value, self.history = state["best_value"], state["history"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"the checkpoint {checkpoint} is another training's ({reason}): delete it to start "
                "this one, or give this one a file of its own"
            ) from None

    def _share_buffers(self) -> None:
        """Gives every process the first one's running statistics: each saw other examples, and all
        must judge and keep the same network."""
        if self.accelerator.num_processes > 1:
            for buffer in self.candidate.buffers():
                broadcast(buffer)

    def _looks_at_gradients(self, terms: dict[str, Tensor]) -> bool:
        """Whether there is something to compare, and no other process to keep in step with."""
        return len(terms) > 1 and self.accelerator.num_processes == 1

    def _set_rate(self, epochs_done: float) -> None:
        progress = epochs_done / self.training.epochs
        rate = self.training.optimizer.lr * rate_factor(self.training.schedule, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _progress(self, epoch: int, index: int, loss: Tensor, tell: Listener) -> None:
        value = float(loss.detach())
        self._require_finite(value, epoch)
        tell(
            {
                "event": "step",
                "label": self.label,
                "epoch": epoch + 1,
                "epochs": self.training.epochs,
                "step": index + 1,
                "steps": self.steps,
                "loss": value,
            }
        )

    def _require_finite(self, loss: float, epoch: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"{self.label}: the loss became {loss} in epoch {epoch + 1}; a lower learning rate "
                f"(optimizer.lr is {self.training.optimizer.lr:g}), gradient clipping (clip: 1.0) "
                "or a longer warm-up (schedule.warmup) usually cures it"
            )

    def _improves(self, value: float) -> bool:
        if math.isnan(self.best_value):
            return not math.isnan(value)
        if self.task.metric.higher_is_better:
            return value > self.best_value
        return value < self.best_value


def make_optimizer(
    parameters: list[nn.Parameter], config: Optimizer, undecayed: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The update rule that `config` names, in its fused form. undecayed: which of the parameters
    weight decay leaves alone."""
    spared = {id(p) for p in undecayed}
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in spared]}]
    if alone := [p for p in parameters if id(p) in spared]:
        groups.append({"params": alone, "weight_decay": 0.0})
    if config.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def uses_convolutions(module: nn.Module) -> bool:
    """Whether the channels-last layout pays: the network has 2-d convolutions."""
    return any(isinstance(m, nn.Conv2d) for m in module.modules())


def _count_steps(data: Data, training: Training) -> int:
    examples = len(data.train)
    if examples <= training.batch_size:
        return 1
    return examples // training.batch_size


def augmentation_seed(seed: int, label: str) -> int:
    """What the training called `label` draws its order and augmentation by."""
    return _derived_seed(seed, label, 0)


def _derived_seed(seed: int, label: str, epoch: int) -> int:
    digest = hashlib.sha256(f"{seed}/{label}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
