"""The frame of every training run: resume, step after step, validate, log, save, and end politely.

Pre-training, supervised fine-tuning and reinforcement differ in what a step computes, and share all that is here. A
step must follow from the settings, the state that `saved_state` names, and its number: then a run that was interrupted
goes on as if it had not been.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.checkpoint import save_pretrained
from ..core.files import NO_SPACE, atomic_write
from ..core.model import DeepseekV3
from ..core.moe import Gate
from ..core.tokenizer import Tokenizer
from ..errors import UserError
from ..ops.op import activate_backend
from ..parallel.data import DataParallel
from ..parallel.gradients import Gradients
from .balance import Balancer, max_violation
from .checkpointing import Checkpoints, model_tensors
from .config import RunConfig, check_resume
from .ema import Ema
from .metrics import MetricsLog, read_metrics
from .optim import AdamW
from .plots import draw
from .progress import Progress
from .signals import StopRequest

METRICS = "metrics.jsonl"


def run_training(
    config: RunConfig, backend: str, build: Callable[[DataParallel, Progress], "TrainingRun"]
) -> Path | None:
    """Run, or go on with, the run that `build` puts together on this process's device. Returns the directory of the
    finished model (Hugging Face format), or None where a signal ended the run early; its checkpoint is then saved.
    """
    device = activate_backend(backend).device
    try:
        with DataParallel.start(device) as parallel, Progress(parallel.is_main) as progress:
            return build(parallel, progress).run()
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(f"{config.run_dir}: the disk is full; make room and run the same command to go on") from error


class TrainingRun(ABC):
    """The parts of a run, put together. `step` is the next step to do."""

    total_steps: int

    def __init__(
        self,
        config: RunConfig,
        model: DeepseekV3,
        tokenizer: Tokenizer,
        parallel: DataParallel,
        progress: Progress,
    ):
        self.settings, self.model, self.tokenizer = config, model, tokenizer
        self.parallel, self.progress = parallel, progress
        self.directory = Path(config.run_dir)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.gradients = Gradients(parameter for _, parameter in trained)
        optim = config.optim
        self.optimizer = AdamW(trained, optim.betas, optim.eps, optim.weight_decay, optim.bf16_moments)
        ema = config.ema_decay
        self.ema = Ema(self.optimizer.names, self.optimizer.masters, ema) if ema else None
        gates = [module for module in model.modules() if isinstance(module, Gate)]
        biases = {gate.layer: gate.e_score_correction_bias for gate in gates}
        self.balancer = Balancer(biases, config.balance.centred) if biases else None
        self.checkpoints = Checkpoints(self.directory / "checkpoints", config.checkpoint.keep)
        self.step = self.skipped = self.skipped_in_a_row = 0

    # What a kind of training says about itself.

    @abstractmethod
    def optimize(self, step: int) -> dict[str, Any]:
        """One optimizer step, with `update` at its end; what the log says about it, `loss` at least."""

    @abstractmethod
    def describe(self, values: dict[str, Any], seconds: float) -> str:
        """The line of progress after a step that took `seconds`; may add to `values`, which are logged afterwards."""

    @property
    @abstractmethod
    def data_fingerprint(self) -> str:
        """What the data is: a run does not go on with other data."""

    def validate(self, values: dict[str, Any]) -> None:
        """Called behind every step; adds "validation/..." where it is time to."""

    def after_step(self) -> None:
        """Called when a step is logged."""

    def began(self) -> None:
        """Called once `step` is known, on every process, before the first step."""

    def saved_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors and counters; anything json keeps."""
        return {}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take back what `saved_state` gave."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, by group. Weights that do not train are not among them."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        changing = {name: tensor for name, tensor in model_tensors(self.model).items() if name not in frozen}
        tensors = {"model": changing, "optimizer": self.optimizer.state_dict()}
        return tensors | ({"ema": self.ema.state_dict()} if self.ema is not None else {})

    def save_model(self, target: Path) -> None:
        """Write the model as it is in the Hugging Face format."""
        save_pretrained(self.model, self.model.config, target, also=self.tokenizer.save)

    def advice(self, target: Path) -> str:
        """How to use the finished model; ends the last line that a run says."""
        return f"; try: dsv3 generate {target} --prompt TEXT"

    def draw_log(self) -> None:
        """Draw the pictures of the finished run."""
        draw(read_metrics(self.directory / METRICS), self.directory)

    # The loop.

    def run(self) -> Path | None:
        """Returns the directory of the finished model, or None where a signal ended the run early, its state saved."""
        self._resume()
        self.began()
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            log = None
            if self.parallel.is_main:
                log = stack.enter_context(
                    MetricsLog(self.directory / METRICS, self.step, self.settings.log.tensorboard)
                )
                with atomic_write(self.directory / "config.toml", "w") as file:
                    file.write(self.settings.to_toml())
            while self.step < self.total_steps:
                self._advance(log)
                (stopping,) = self.parallel.any(stop.requested is not None)
                due = self.settings.checkpoint.every and self.step % self.settings.checkpoint.every == 0
                if stopping or due or self.step == self.total_steps:
                    self._save(log)
                if stopping and self.step < self.total_steps:
                    self.progress.say(
                        f"stopped by {stop.requested or 'another process'} before step {self.step}; "
                        f"the checkpoint is saved, run the same command to go on"
                    )
                    return None
        return self._finish()

    def _advance(self, log: MetricsLog | None) -> None:
        began, step = time.perf_counter(), self.step
        values = self.optimize(step)
        self.step += 1
        line = self.describe(values, time.perf_counter() - began)
        self.validate(values)
        last = self.step == self.total_steps
        validated = any(key.startswith("validation/") for key in values)
        if log is not None and (last or step % self.settings.log.every == 0 or validated):
            log.write(step, values)
        self.progress.show(line, final=last)
        self.after_step()

    def update(self, step: int, loss: float, lr: float, gamma: float) -> dict[str, Any]:
        """Reduce and clip the gradients, then move weights, biases and average, or skip a step that is not finite.

        loss: of the global batch. gamma: of the balancing biases. Returns what the log says about it.
        """
        self.parallel.reduce_gradients(self.gradients, average=False)  # losses are divided by the global batch already
        norm = self.gradients.clip(self.settings.optim.grad_clip)
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self.optimizer.step(lr, self.gradients.views)
            self.skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.optimizer.masters)
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            what = "loss or gradient is not finite, the step is skipped"
            self.progress.say(f"step {step}: {what} ({self.skipped} so far)")
        loads = self.balancer.finish(gamma if finite else 0.0, self.parallel.sum) if self.balancer is not None else None
        if self.skipped_in_a_row and self.skipped_in_a_row >= self.settings.max_skipped_steps:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite: lower optim.lr, or "
                f"look at the data from step {step - self.skipped_in_a_row + 1} on; the last checkpoint is kept"
            )
        # A layer that no token passed, an MTP module of weight 0, has load 0.
        relative = loads / loads.double().mean(-1, keepdim=True).clamp_min(1e-9) if loads is not None else None
        return {
            "grad_norm": norm,
            "lr": lr,
            "max_violation": max_violation(loads).max().item() if loads is not None else 0.0,
            "expert_load": relative.tolist() if relative is not None else [],
            "skipped_steps": self.skipped,
        }

    # Checkpoints.

    def _save(self, log: MetricsLog | None) -> None:
        failed = None
        if log is not None:
            log.sync()
            state = self.saved_state() | {
                "data": self.data_fingerprint,
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
            }
            try:
                self.checkpoints.save(self.step, self.tensors(), state, self.settings.to_toml())
            except UserError as error:
                failed = str(error)
        # All processes wait for the checkpoint, and end together where it cannot be written.
        if failed := self.parallel.broadcast_object(failed):
            raise UserError(failed)

    def _resume(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir {self.directory} cannot be made ({error.strerror}): choose another") from None
        saved = self.checkpoints.newest(self.progress.say)
        # All processes must take the same one, and process 0 alone may have seen a file system's newest state.
        path = self.parallel.broadcast_object(saved.path if saved is not None else None)
        if path is None:
            self.progress.say(f"new run in {self.directory}: {self.total_steps} steps")
            return
        if saved is None or saved.path != path:
            raise UserError(f"checkpoint {path} is not visible to every process: put run_dir on a shared file system")
        for key in check_resume(saved.config, self.settings):
            self.progress.say(f"note: {key} has changed since the checkpoint")
        if saved.state["data"] != self.data_fingerprint:
            raise UserError(
                f"the data of {self.directory} has changed since its checkpoint: restore it, or use another run_dir"
            )
        saved.restore(self.tensors())
        self.step, self.skipped = saved.step, saved.state["skipped"]
        self.skipped_in_a_row = saved.state["skipped_in_a_row"]
        self.restore_state(saved.state)
        self.progress.say(f"going on from {path} at step {self.step} of {self.total_steps}")

    def _finish(self) -> Path:
        """Pictures, and the model in the Hugging Face format."""
        target = self.directory / "model"
        if self.parallel.is_main:
            self.draw_log()
            self.save_model(target)
            if self.ema is not None:
                with self.ema.applied(self.optimizer.parameters):
                    self.save_model(self.directory / "model-ema")
            self.progress.say(f"the model is in {target}{self.advice(target)}")
        self.parallel.barrier()
        return target
