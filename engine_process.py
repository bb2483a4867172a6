"""The engine's process, as `dsv3 serve` starts it: `python -m dsv3.engine_process DESCRIPTOR OPTIONS`.

DESCRIPTOR: of its end of a socket pair. OPTIONS: JSON of `EngineOptions`.
"""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from .errors import UserError

if TYPE_CHECKING:
    from .core.config import ModelConfig
    from .core.model import DeepseekV3
    from .parallel.channel import Channel
    from .serving.engine import Engine
    from .serving.group import Member
    from .serving.messages import EngineInfo
    from .serving.runner import Runner, RunnerSettings

GROUP_TIMEOUT = timedelta(seconds=120)  # a process that is silent for so long is lost

CACHE_SHARE = {"cpu": 0.25, "cuda": 0.9}  # of the memory that is free once the weights are there


@dataclass(frozen=True)
class EngineOptions:
    """directory: of the model. name: that it is asked for by. backend, dtype, fp8: as on the command line.

    context: tokens of the longest text, 0 for the model's. cache: "auto" (the weights' type), "bfloat16", "float32" or
    "fp8"; cache_gib: its size, 0 for a share of the free memory. requests: that run at a time. step_ms: that a step may
    take while somebody's text is being written. speculative_tokens: drafted per step.
    ends: ids that end a text. threads: of the CPU, 0 for torch's choice. dp: groups of processes with requests of their
    own, under torchrun.
    """

    directory: str
    name: str
    backend: str = "auto"
    dtype: str | None = None
    fp8: str = "keep"
    context: int = 0
    cache: str = "auto"
    cache_gib: float = 0.0
    requests: int = 256
    step_ms: float = 50.0
    speculative_tokens: int = 0
    prefix_caching: bool = True
    batch_invariant: bool = False
    ends: tuple[int, ...] = ()
    threads: int = 0
    dp: int = 1


def start(options: EngineOptions) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """Start the process; our end of the socket, and the process."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "dsv3.engine_process", str(theirs.fileno()), _encoded(options)]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    return ours, process


def _encoded(options: EngineOptions) -> str:
    return msgspec.json.encode(asdict(options)).decode()


def make(options: EngineOptions) -> "tuple[Engine, EngineInfo]":
    """Load the model and build the engine around it. Raises UserError for what cannot be."""
    from .core.tokenizer import Tokenizer
    from .serving.cost import CostModel
    from .serving.engine import Engine, EngineSettings
    from .serving.guides import Guides
    from .serving.measure import measure
    from .serving.messages import EngineInfo
    from .serving.scheduler import Limits

    runner, config, backend = _runner(options)
    tokenizer = Tokenizer.load(options.directory)
    context = _context(options.context, config.max_position_embeddings)
    cost = CostModel() if options.batch_invariant else measure(runner, context)
    limits = Limits(options.requests, seconds=options.step_ms / 1000)
    capacity = runner.num_blocks * runner.page_size
    ends = frozenset(options.ends) or frozenset(config.eos_token_ids)
    settings = EngineSettings(context, config.vocab_size, capacity, ends, options.prefix_caching, limits, cost)
    guides = Guides(tokenizer, config.vocab_size, ends)
    engine = Engine(runner, settings, partial(tokenizer.decode, skip_special=True), guides)
    drafts, page = options.speculative_tokens, runner.page_size
    info = EngineInfo(options.name, context, config.vocab_size, page, capacity, backend, drafts)
    return engine, info


def follow(options: EngineOptions) -> None:
    """What every process of torchrun but the first does: compute with its part until the first one ends.

    torchrun hands signals on to all of its processes: those that follow are still needed while the first one drains.
    """
    from .parallel.channel import PeerLost
    from .serving.group import follow as obey

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    member, channel, _ = _member(options)
    try:
        obey(member, channel)
    except PeerLost as lost:
        raise UserError(str(lost)) from None


def _runner(options: EngineOptions) -> "tuple[Runner, ModelConfig, str]":
    """Who computes, the whole model's configuration, and the backend's name."""
    from .core.model import DeepseekV3
    from .serving.group import GroupRunner
    from .serving.runner import ModelRunner

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        member, channel, backend = _member(options)
        return GroupRunner(member, channel), member.whole, backend
    if options.dp > 1:
        raise UserError(f"--dp {options.dp} needs processes: torchrun --nproc-per-node {options.dp} -m dsv3 serve ...")
    device, backend = _activated(options)
    model = DeepseekV3.from_pretrained(options.directory, device=device, dtype=_dtype(options), fp8=options.fp8)
    model.pack()
    runner = ModelRunner(model, replace(_settings(model, options), captured=not options.batch_invariant))
    runner.warm()
    return runner, model.config, backend


def _member(options: EngineOptions) -> "tuple[Member, Channel, str]":
    from .core.config import ModelConfig
    from .parallel.channel import Channel
    from .parallel.data import DataParallel
    from .parallel.inference import load_spread
    from .parallel.mesh import Mesh
    from .serving.group import Member

    if options.batch_invariant:
        raise UserError("--batch-invariant is for one process; leave it out, or torchrun")
    device, backend = _activated(options)
    joined = DataParallel.start(device, GROUP_TIMEOUT)
    mesh, channel = Mesh.over_world(dp=options.dp, timeout=GROUP_TIMEOUT), Channel(GROUP_TIMEOUT)
    fp8: Any = options.fp8
    model = load_spread(options.directory, mesh, _dtype(options), joined.device, fp8)
    model.pack()
    settings = _settings(model, options)
    # Every shard has as many pages as the rank with the least room can have.
    pages = torch.tensor(settings.num_blocks)
    torch.distributed.all_reduce(pages, torch.distributed.ReduceOp.MIN)
    whole = ModelConfig.from_pretrained(options.directory)
    return Member(model, mesh, replace(settings, num_blocks=int(pages)), whole), channel, backend


def _activated(options: EngineOptions) -> tuple[str, str]:
    """Device and name of the backend, which is active from here on."""
    from .backends import activate

    if options.threads:
        torch.set_num_threads(options.threads)
    name = options.backend
    if options.batch_invariant:
        if name not in ("auto", "cpu", "cpu-invariant"):
            raise UserError(f"--batch-invariant: backend {name} has no batch-invariant kernels; cpu has")
        name = "cpu-invariant"
    backend = activate(name)
    return backend.device, backend.name


def _dtype(options: EngineOptions) -> torch.dtype | None:
    return None if options.dtype is None else getattr(torch, options.dtype)


def _settings(model: "DeepseekV3", options: EngineOptions) -> "RunnerSettings":
    from .serving.runner import RunnerSettings

    kept = cache_dtype(options.cache)
    context = _context(options.context, model.config.max_position_embeddings)
    pages = _pages(model, kept, options, context)
    return RunnerSettings(pages, options.requests, kept, options.speculative_tokens, options.batch_invariant)


def cache_dtype(name: str) -> torch.dtype | None:
    """Of --cache; None is the weights'."""
    from .ops.formats import E4M3

    return {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": E4M3}[name]


def _context(wanted: int, most: int) -> int:
    if wanted > most:
        raise UserError(f"--context {wanted} is more than the model's {most} tokens")
    return wanted or most


def _pages(model: "DeepseekV3", dtype: torch.dtype | None, options: EngineOptions, context: int) -> int:
    """Pages of the cache: as much memory as was asked for or is to be had, no more than all requests can fill."""
    from .ops.cache_layout import cache_layout

    weight = model.model.norm.weight
    layout = cache_layout(model.config, dtype or weight.dtype)
    each = layout.bytes_per_page * model.config.num_layers_with_mtp
    whole = -(-context // layout.page_size)
    kind = weight.device.type
    bytes = int(options.cache_gib * 2**30) or int(_free_bytes(kind) * CACHE_SHARE[kind])
    pages = min(bytes // each, whole * options.requests)
    if pages < 2:
        raise UserError(f"there is no room for the cache: a page takes {each} bytes, and it may take {bytes}")
    return pages


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str]) -> None:
    from .serving import process

    descriptor, text = argv
    options = msgspec.json.decode(text, type=EngineOptions)
    process.main(int(descriptor), lambda: make(options))


if __name__ == "__main__":
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    main(sys.argv[1:])
