"""The engine's process, as `dsv3 serve` starts it: `python -m dsv3.engine_process DESCRIPTOR OPTIONS`.

DESCRIPTOR: of its end of a socket pair. OPTIONS: JSON of `EngineOptions`.
"""

import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import UserError

if TYPE_CHECKING:
    from .core.model import DeepseekV3
    from .serving.engine import Engine
    from .serving.messages import EngineInfo

CACHE_SHARE = {"cpu": 0.25, "cuda": 0.9}  # of the memory that is free once the weights are there


@dataclass(frozen=True)
class EngineOptions:
    """directory: of the model. name: that it is asked for by. backend, dtype, fp8: as on the command line.

    context: tokens of the longest text, 0 for the model's. cache: "auto" (the weights' type), "bfloat16", "float32" or
    "fp8"; cache_gib: its size, 0 for a share of the free memory. requests: that run at a time. step_ms: that a step may
    take while somebody's text is being written. speculative_tokens: drafted per step, -1 for what pays on this backend.
    ends: ids that end a text. threads: of the CPU, 0 for torch's choice.
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
    speculative_tokens: int = -1
    prefix_caching: bool = True
    batch_invariant: bool = False
    ends: tuple[int, ...] = ()
    threads: int = 0


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
    import torch

    from .backends import activate
    from .core.model import DeepseekV3
    from .core.tokenizer import Tokenizer
    from .ops.formats import E4M3
    from .serving.cost import CostModel
    from .serving.engine import Engine, EngineSettings
    from .serving.guides import Guides
    from .serving.measure import measure
    from .serving.messages import EngineInfo
    from .serving.runner import ModelRunner, RunnerSettings
    from .serving.scheduler import Limits

    if options.threads:
        torch.set_num_threads(options.threads)
    wanted = f"{options.backend}-invariant" if options.batch_invariant else options.backend
    backend = activate("cpu-invariant" if wanted == "auto-invariant" else wanted)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = DeepseekV3.from_pretrained(options.directory, device=backend.device, dtype=dtype, fp8=options.fp8)
    model.pack()
    config, tokenizer = model.config, Tokenizer.load(options.directory)
    context = _context(options.context, config.max_position_embeddings)
    caches = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": E4M3}
    drafts = options.speculative_tokens
    if drafts > 0 and not config.num_nextn_predict_layers:
        raise UserError("speculative decoding drafts with the MTP module, and this model has none; leave it off")
    drafts = max(drafts, 0)
    kept = caches[options.cache]
    pages = _pages(model, kept, options, context)
    runner = ModelRunner(model, RunnerSettings(pages, options.requests, kept, drafts, options.batch_invariant))
    cost = CostModel() if options.batch_invariant else measure(runner, context)
    limits = Limits(options.requests, seconds=options.step_ms / 1000)
    capacity = pages * runner.page_size
    ends = frozenset(options.ends) or frozenset(config.eos_token_ids)
    settings = EngineSettings(context, config.vocab_size, capacity, ends, options.prefix_caching, limits, cost)
    guides = Guides(tokenizer, config.vocab_size, ends)
    engine = Engine(runner, settings, partial(tokenizer.decode, skip_special=True), guides)
    info = EngineInfo(options.name, context, config.vocab_size, runner.page_size, capacity, backend.name, drafts)
    return engine, info


def _context(wanted: int, most: int) -> int:
    if wanted > most:
        raise UserError(f"--context {wanted} is more than the model's {most} tokens")
    return wanted or most


def _pages(model: "DeepseekV3", dtype: Any, options: EngineOptions, context: int) -> int:
    """Pages of the cache: as much memory as was asked for or is to be had, no more than all requests can fill."""
    from .ops.cache_layout import cache_layout

    weight = model.model.embed_tokens.weight
    layout = cache_layout(model.config, dtype or weight.dtype)
    each = layout.bytes_per_page * model.config.num_layers_with_mtp
    whole = -(-context // layout.page_size)
    free = int(options.cache_gib * 2**30) or int(_free_bytes(weight.device.type) * CACHE_SHARE[weight.device.type])
    pages = min(free // each, whole * options.requests)
    if pages < 2:
        raise UserError(
            f"there is no room for the cache: a page takes {each} bytes and {free} are free; see --cache-gib"
        )
    return pages


def _free_bytes(device: str) -> int:
    import torch

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
