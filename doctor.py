"""`dsv3 doctor`: what this machine has, which backends it can run and why not, which kernel each op would take.

`dsv3 doctor MODEL` describes a model instead: its size, and what a token costs in the cache.
"""

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch

from . import __version__, backends, ops
from .backends import Backend
from .core.cache_size import CacheBytes, cache_bytes_per_token
from .core.config import ModelConfig
from .ops.op import Kernel, Op, always

# Distribution -> the extra that installs it; "" for what every installation has.
LIBRARIES = {
    "torch": "", "numpy": "", "safetensors": "", "tokenizers": "", "rich": "",
    "pyarrow": "train", "tensorboard": "train", "matplotlib": "train",
    "transformers": "dev",
    "triton": "cuda", "cupy-cuda13x": "cuda", "cupy-rocm-7-0": "rocm", "amd-aiter": "rocm", "torch-npu": "ascend",
    "starlette": "serve", "uvicorn": "serve", "llguidance": "serve",
    "onnx": "export", "onnxruntime": "export", "gguf": "export",
    "lm-eval": "eval", "math-verify": "eval",
}  # fmt: skip

# Our name -> the flags of torch.cpu.get_capabilities() that it takes.
CPU_FEATURES = {
    "avx2": ("avx2", "fma3"),
    "avx512": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_bf16": ("amx_bf16",),
}


def run(args: argparse.Namespace) -> None:
    if args.model is not None:
        report = describe_model(args.model)
        _show(args.json, report, _model_lines(report))
    elif args.ops:
        rows = op_rows(backends.activate(args.backend))
        _show(args.json, rows, _op_lines(rows))
    else:
        selected = backends.activate(args.backend)
        report = describe_machine(selected)
        _show(args.json, report, _machine_lines(report))


def _show(as_json: bool, report: Any, lines: Iterable[str]) -> None:
    print(json.dumps(report, indent=2) if as_json else "\n".join(lines))


# --- the machine ---


def describe_machine(selected: Backend) -> dict[str, Any]:
    return {
        "dsv3": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": describe_cpu(),
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "backends": [describe_backend(backend, selected) for backend in backends.discover().values()],
    }


def describe_cpu() -> dict[str, Any]:
    found = torch.cpu.get_capabilities()
    return {
        "name": found.get("cpu_name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [name for name, flags in CPU_FEATURES.items() if all(found.get(flag) for flag in flags)],
    }


def library_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def describe_backend(backend: Backend, selected: Backend) -> dict[str, Any]:
    reason = backend.why_not()
    devices = _device_names(backend) if reason is None else []
    return {
        "name": backend.name,
        "device": backend.device,
        "usable": reason is None,
        "why_not": reason,
        "devices": devices,
        "remark": backend.remark() if reason is None else "",
        "selected": backend.name == selected.name,
    }


def _device_names(backend: Backend) -> list[str]:
    if backend.device == "cpu":
        return []
    module = torch.get_device_module(backend.device)
    return [module.get_device_name(index) for index in range(module.device_count())]


def _machine_lines(report: dict[str, Any]) -> Iterable[str]:
    cpu = report["cpu"]
    features = " ".join(cpu["features"]) or "no vector extensions that dsv3 knows of"
    yield f"dsv3 {report['dsv3']}, Python {report['python']}, {report['platform']}"
    yield f"CPU {cpu['name']}: {cpu['cores']} cores, {cpu['threads']} threads in use, {features}"
    libraries = report["libraries"]
    yield "libraries  " + ", ".join(f"{name} {version}" for name, version in libraries.items() if version)
    missing: dict[str, list[str]] = {}
    for name, version in libraries.items():
        if version is None:
            missing.setdefault(LIBRARIES[name], []).append(name)
    for extra, names in missing.items():
        yield f"           not installed: {', '.join(names)} (pip install 'dsv3[{extra}]')"
    yield "backends"
    for backend in report["backends"]:
        mark = "*" if backend["selected"] else " "
        state = ", ".join(backend["devices"]) or "usable" if backend["usable"] else f"not usable: {backend['why_not']}"
        remark = f"; {backend['remark']}" if backend["remark"] else ""
        yield f"  {mark} {backend['name']:<8} {state}{remark}"
    yield "  * is what --backend takes here"


# --- the ops ---


def op_rows(backend: Backend) -> list[dict[str, Any]]:
    """For every op the kernels of `backend` in the order in which a call asks them, up to one that takes every call."""
    return [row for name, op in sorted(ops.load().items()) for row in _rows_of(name, op, backend)]


def _rows_of(name: str, op: Op, backend: Backend) -> Iterable[dict[str, Any]]:
    for kernel in [*op.kernels.get(backend.name, ()), op.specification]:
        yield {
            "op": name,
            "backend": backend.name,
            "kernel": kernel.run.__name__,
            "provider": kernel.provider,
            "available": kernel.usable,
            "checked": kernel.checked,
            "takes": "all" if kernel.supports is always else "some",
        }
        if _takes_all(kernel):
            return


def _takes_all(kernel: Kernel) -> bool:
    return kernel.usable and kernel.supports is always


def _op_lines(rows: list[dict[str, Any]]) -> Iterable[str]:
    columns = ("op", "backend", "kernel", "provider", "available", "checked", "takes")
    table = [columns, *(tuple(_cell(row[column]) for column in columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    yield "A call runs the first kernel that is available and takes its arguments."
    yield "`checked` is the strongest check that the kernel has passed; `reference` is the specification itself."


def _cell(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


# --- a model ---


def describe_model(model: str) -> dict[str, Any]:
    config = ModelConfig.from_pretrained(model)
    return {
        "model": model,
        "parameters": count_parameters(config),
        "config": config.to_dict(),
        "cache_bytes_per_token": dataclasses.asdict(cache_bytes_per_token(config)),
    }


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Of the main model and of its MTP modules, without the copies of embedding and head that checkpoints store."""
    from .core.model import DeepseekV3

    main = mtp = 0
    mtp_layers = tuple(f"model.layers.{i}." for i in range(config.num_hidden_layers, config.num_layers_with_mtp))
    model = DeepseekV3(config, device="meta")
    biases = ((name, tensor) for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias"))
    for name, tensor in (*model.named_parameters(), *biases):
        if name.startswith(mtp_layers):
            mtp += tensor.numel()
        else:
            main += tensor.numel()
    return {"main": main, "mtp": mtp}


def _model_lines(report: dict[str, Any]) -> Iterable[str]:
    config, count = report["config"], report["parameters"]
    size = CacheBytes(**report["cache_bytes_per_token"])
    mtp = f", and {count['mtp']:,} in the MTP modules" if count["mtp"] else ""
    yield f"{report['model']}: {count['main']:,} parameters{mtp}"
    yield (
        f"  {config['num_hidden_layers']} layers ({config['first_k_dense_replace']} dense first) of "
        f"{config['hidden_size']}, {config['num_attention_heads']} heads, vocabulary {config['vocab_size']:,}"
    )
    yield (
        f"  experts: {config['num_experts_per_tok']} of {config['n_routed_experts']} routed, "
        f"{config['n_shared_experts']} shared, {config['scoring_func']} gate"
    )
    yield "cache, bytes per token over all layers"
    rows = {
        "MLA, bfloat16": size.latent_bf16,
        "MLA, FP8": size.latent_fp8,
        "multi-head attention, equal heads, bfloat16": size.mha_bf16,
        "grouped-query attention, 8 groups, bfloat16": size.gqa8_bf16,
    }
    for name, count_bytes in rows.items():
        yield f"  {name:<44}{count_bytes:>12,}  {count_bytes / size.latent_bf16:6.1f} x"
