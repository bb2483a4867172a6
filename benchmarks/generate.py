"""Prefill and decoding with a long context: dsv3 beside transformers, the same checkpoint, the same tokens.

    python benchmarks/generate.py                        # context of 4,096 tokens, bfloat16 and float32
    python benchmarks/generate.py --context 1024 --rounds 1
    python benchmarks/generate.py --backend cuda --layers 27 --precisions bf16 fp8    # all of Moonlight, on a GPU

Model: Moonlight-16B-A3B, by default cut to 3 layers (one dense, two with experts), vocabulary 32,768, random weights.
fp8: dsv3 with its matrices in FP8 blocks, beside transformers in bfloat16.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch
from contest import contest, machine, table

STEPS = 16
EXPERTS = ("eager", "grouped_mm")  # the ways that transformers has to compute experts


def save_model(directory: Path, layers: int, device: str) -> None:
    from dsv3 import DeepseekV3, ModelConfig
    from dsv3.core.checkpoint import save_pretrained

    config = ModelConfig.from_pretrained("moonlight-16b-a3b").replace(
        num_hidden_layers=layers, vocab_size=32768, bos_token_id=0, eos_token_id=None
    )
    model = DeepseekV3(config, dtype=torch.bfloat16, device=device)
    model.init_weights(0.02)
    save_pretrained(model, config, directory)


def prompt_of(context: int) -> torch.Tensor:
    return torch.randint(0, 32768, (context,), generator=torch.Generator().manual_seed(0))


def to_fp8(model: torch.nn.Module) -> None:
    """Every matrix of a layer in FP8 blocks, as a published checkpoint has them."""
    from dsv3.core.linear import Linear
    from dsv3.ops.fp8 import quantize_blocks

    for module in model.model.layers.modules():
        if isinstance(module, Linear):
            module.load_fp8(*quantize_blocks(module.weight.detach()))


def ours(options: argparse.Namespace, precision: str) -> list[float]:
    """When the prompt was read, and when each token came."""
    from dsv3 import DeepseekV3
    from dsv3.core.generate import SamplingParams, SimpleRollout

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    device = "cpu" if options.backend == "cpu" else "cuda"
    model = DeepseekV3.from_pretrained(options.directory, backend=options.backend, dtype=dtype, device=device)
    if precision == "fp8":
        to_fp8(model)
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 1, ignore_eos=True)
    prompt, rollout = prompt_of(options.context).tolist(), SimpleRollout(model)
    if device == "cuda":  # the first time, kernels compile
        rollout.generate([prompt], params)
    times = [time.perf_counter()]
    for _ in rollout.stream([prompt], params):
        times.append(time.perf_counter())
    return times


def theirs(options: argparse.Namespace, precision: str, experts: str) -> list[float]:
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    device = "cpu" if options.backend == "cpu" else "cuda"
    model = AutoModelForCausalLM.from_pretrained(options.directory, dtype=dtype, device_map=device).eval()
    model.set_experts_implementation(experts)
    prompt = prompt_of(options.context)[None].to(device)
    with torch.inference_mode():
        if device == "cuda":
            model(prompt, use_cache=True, logits_to_keep=1)
        times = [time.perf_counter()]
        output = model(prompt, use_cache=True, logits_to_keep=1)
        for _ in range(STEPS + 1):
            token = output.logits[:, -1:].argmax(-1)
            token.tolist()  # as whoever streams it would
            times.append(time.perf_counter())
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return times


def run(name: str, options: argparse.Namespace) -> dict:
    torch.set_num_threads(options.threads)
    who, precision, *rest = name.split("-")
    times = ours(options, precision) if who == "dsv3" else theirs(options, precision, rest[0])
    prefill, *steps = (after - before for before, after in itertools.pairwise(times))
    return {"rate": 1 / sorted(steps)[len(steps) // 2], "prefill": options.context / prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache before decoding")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backend", default="cpu", choices=("cpu", "cuda", "rocm"))
    parser.add_argument("--layers", type=int, default=3, help="27 is the whole model")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32", "fp8"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options.only, options)))
        return
    theirs_in = {"fp8": "bf16"}  # transformers has no FP8 of this kind: held against its bfloat16
    peers = {precision: theirs_in.get(precision, precision) for precision in options.precisions}
    names = [f"dsv3-{precision}" for precision in peers]
    names += [f"transformers-{precision}-{how}" for precision in sorted({*peers.values()}) for how in EXPERTS]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_model(directory, options.layers, "cpu" if options.backend == "cpu" else "cuda")
        arguments = ["--directory", str(directory)]
        for key in ("context", "backend", "layers", "threads"):
            arguments += [f"--{key}", str(getattr(options, key))]
        best = contest(__file__, names, options.rounds, arguments)
    print(table(best, "tokens/s"))
    for precision, other in peers.items():
        results = [result for name, result in best.items() if name.startswith(f"transformers-{other}")]
        if f"dsv3-{precision}" in best and results:
            for key, what in (("rate", "decoding"), ("prefill", "prefill")):
                ratio = best[f"dsv3-{precision}"][key] / max(result[key] for result in results)
                print(f"{what} at {options.context} tokens, {precision}: {ratio:.2f} of transformers' best mode")
    overall = max(r["rate"] for name, r in best.items() if name.startswith("t"))
    ours_best = max(r["rate"] for name, r in best.items() if name.startswith("d"))
    print(f"our best over their best in any precision, decoding: {ours_best / overall:.2f}")
    print(machine())
    if options.backend != "cpu":
        print(torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
