"""Pre-training: the recipe of DeepSeek-V3 as one loop (report, section 4.2).

A step: the global batch is cut into the processes' shares and those into micro-batches; loss and gradients accumulate;
gradients are summed over the processes and clipped; AdamW moves the weights; the balancing biases move by what the
gates chose over the whole batch. Everything a step depends on follows from the settings and the step's number, so a run
that was interrupted goes on bit for bit (on a CPU), on another number of processes too, up to the order of sums.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..core.config import ModelConfig
from ..core.files import atomic_write
from ..core.generate import SamplingParams, SimpleRollout
from ..core.model import DeepseekV3
from ..core.tokenizer import Tokenizer
from ..errors import UserError
from ..parallel.data import DataParallel
from .config import PretrainConfig
from .data.loader import Batch, BatchStream, ValidationSet
from .data.shards import TokenSet
from .data.transforms import tokenizer_fingerprint
from .flops import flops_per_token
from .loop import TrainingRun, run_training
from .loss import pretraining_loss
from .progress import Progress, Speed, describe, matmul_peak
from .schedule import Schedule
from .validation import bits_per_byte

SAMPLES = "samples.tsv"


def pretrain(config: PretrainConfig, backend: str = "auto") -> Path | None:
    """Run, or go on with, the run that `config` describes. Returns the directory of the finished model (Hugging Face
    format), or None where a signal ended the run early; its checkpoint is then saved.
    """
    return run_training(config, backend, lambda parallel, progress: Pretraining(config, parallel, progress))


class Pretraining(TrainingRun):
    """A step: forward and backward over the global batch, then the update."""

    def __init__(self, config: PretrainConfig, parallel: DataParallel, progress: Progress):
        self.config = config
        self.schedule = Schedule(config)
        first = self.schedule.timeline.batch_size(0)
        if first < parallel.world_size:
            raise UserError(
                f"the first step has {first} sequences for {parallel.world_size} processes: "
                "raise batch.sequences or batch.ramp.start, or start fewer processes"
            )
        if not config.tokenizer:
            raise UserError("tokenizer is not set: name a directory with a tokenizer.json")
        tokenizer = Tokenizer.load(config.tokenizer)
        self.stream, self.held_out = open_data(config, tokenizer)
        super().__init__(config, build_model(config, tokenizer, parallel), tokenizer, parallel, progress)
        self.total_steps = self.schedule.timeline.total_steps
        dtype = self.model.head_weight.dtype
        peak = matmul_peak(parallel.device, dtype) * parallel.world_size
        self.speed = Speed(flops_per_token(self.model.config, config.data.seq_len), peak)

    @property
    def data_fingerprint(self) -> str:
        return self.stream.fingerprint

    def saved_state(self) -> dict[str, Any]:
        return {"sequences": self.schedule.timeline.sequences_before(self.step)}

    def optimize(self, step: int) -> dict[str, Any]:
        config, schedule = self.config, self.schedule
        sequences, start = schedule.timeline.batch_size(step), schedule.timeline.sequences_before(step)
        self.gradients.zero()
        sums = torch.zeros(3, dtype=torch.float64)  # main, MTP and balance loss
        mine = self.parallel.share(sequences)
        for first in range(mine.start, mine.stop, config.batch.micro_batch):
            count = min(config.batch.micro_batch, mine.stop - first)
            batch = to_device(self.stream.batch(start + first, count), self.parallel.device)
            losses = pretraining_loss(
                self.model, batch, count / sequences, schedule.mtp_weight(step), config.balance.alpha
            )
            losses.total.backward()
            sums += torch.stack([losses.main, losses.mtp, losses.balance]).double().cpu()
            if self.balancer is not None:
                self.balancer.add(losses.routing.counts)
        main, mtp, balance = self.parallel.sum(sums).tolist()
        losses_of_step = {"loss": main, "mtp_loss": mtp, "balance_loss": balance, "batch_sequences": sequences}
        return losses_of_step | self.update(step, main + mtp + balance, schedule.lr(step), schedule.gamma(step))

    def describe(self, values: dict[str, Any], seconds: float) -> str:
        timeline = self.schedule.timeline
        self.speed.update(timeline.batch_size(self.step - 1) * self.config.data.seq_len, seconds)
        values |= {
            "tokens": timeline.tokens_before(self.step),
            "tokens_per_second": self.speed.tokens_per_second,
            "mfu": self.speed.mfu,
        }
        left = timeline.tokens_before(self.total_steps) - timeline.tokens_before(self.step)
        return describe(
            self.step, self.total_steps, self.speed, left, values["loss"], values["grad_norm"], values["max_violation"]
        )

    def validate(self, values: dict[str, Any]) -> None:
        every = self.config.eval.every
        if not every or (self.step % every and self.step != self.total_steps and self.step != 1):
            return
        self.model.eval()
        for name, held_out in self.held_out.items():
            value = bits_per_byte(self.model, held_out, self.config.batch.micro_batch, self.parallel)
            values[f"validation/{name}"] = value
        self.model.train()
        found = ", ".join(f"{key.removeprefix('validation/')} {v:.3f}" for key, v in values.items() if "/" in key)
        self.progress.say(f"step {self.step}: validation, bits per byte: {found}")

    def after_step(self) -> None:
        """Continue the prompts of the settings."""
        sample = self.config.sample
        if not self.parallel.is_main or not sample.every or self.step % sample.every:
            return
        self.model.eval()
        prompts = [[self.tokenizer.bos_id, *self.tokenizer.encode(text)] for text in sample.prompts]
        base = SamplingParams(temperature=sample.temperature, max_tokens=sample.max_tokens)
        params = [replace(base, seed=self.config.seed + i) for i in range(len(prompts))]
        completions = SimpleRollout(self.model).generate(prompts, params)
        lines = []
        for text, completion in zip(sample.prompts, completions, strict=True):
            answer = self.tokenizer.decode(completion.token_ids, skip_special=True)
            self.progress.say(f"step {self.step}: {text!r} -> {answer!r}")
            lines.append(f"step {self.step}\t{text!r}\t{answer!r}\n")
        with open(self.directory / SAMPLES, "a", encoding="utf-8") as file:
            file.writelines(lines)
        self.model.train()

    def began(self) -> None:
        """Remove the samples that an interrupted run wrote after the checkpoint: they are written again."""
        path = self.directory / SAMPLES
        if self.parallel.is_main and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and int(line.split()[1]) <= self.step]
            with atomic_write(path, "w") as file:
                file.writelines(kept)


def open_data(config: PretrainConfig, tokenizer: Tokenizer) -> tuple[BatchStream, dict[str, ValidationSet]]:
    """The training batches, and the validation sets by their name in the log."""
    data = config.data
    if not data.sources:
        raise UserError('data.sources is empty: name prepared directories and their weights, { "data/code" = 1 }')
    opened: dict[str, TokenSet] = {}
    for folder in [*data.sources, *data.validation.values()]:
        if folder not in opened:
            opened[folder] = TokenSet.open(folder)
            if opened[folder].manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
                raise UserError(
                    f"{folder} was prepared with another tokenizer than {config.tokenizer}: prepare it again"
                )
    stream = BatchStream(
        [(opened[folder], weight) for folder, weight in data.sources.items()],
        data.seq_len, config.seed, data.fim_rate, data.split_rate, data.cross_document_attention,
    )  # fmt: skip
    limit = config.eval.batches * config.batch.micro_batch * data.seq_len
    validation = data.validation if config.eval.every else {}
    held_out = {
        name: ValidationSet(opened[folder], data.seq_len, limit, data.cross_document_attention)
        for name, folder in validation.items()
    }
    return stream, held_out


def build_model(config: PretrainConfig, tokenizer: Tokenizer, parallel: DataParallel) -> DeepseekV3:
    """A fresh model; the same on every process, as it follows from the seed."""
    shape: ModelConfig = config.model.resolve()
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {shape.vocab_size}: raise it"
        )
    if config.data.seq_len > shape.max_position_embeddings:
        raise UserError(
            f"data.seq_len is {config.data.seq_len}, the model's context {shape.max_position_embeddings}: shorten it, "
            "or raise model.max_position_embeddings"
        )
    shape = shape.replace(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = DeepseekV3(shape, device=parallel.device, dtype=dtype)
    model.init_weights(config.init_std, config.embedding_std, config.seed)
    model.recompute = config.recompute == "full"
    parallel.broadcast(model.state_dict().values())
    return model.train()


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return Batch(
        batch.tokens.to(device, non_blocking=True),
        batch.targets.to(device, non_blocking=True),
        batch.positions.to(device, non_blocking=True),
        batch.cu_seqlens.to(device, non_blocking=True),
        batch.max_seqlen,
    )
