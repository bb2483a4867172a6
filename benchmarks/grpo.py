"""A step of GRPO: dsv3 beside TRL's GRPOTrainer with transformers' generation; same weights, prompts and group size.

    python benchmarks/grpo.py                            # 32 prompts x 8 completions of up to 48 tokens, one thread
    python benchmarks/grpo.py --limit 512 --prompts 8    # as long as TRL's own default
    python benchmarks/grpo.py --clock cpu                # seconds of this process: on a machine with other work to do
    python benchmarks/grpo.py --device cuda              # dsv3 on a GPU, and TRL beside it where it is installed

Model: dsv3-2m, twice: after 100 steps of the quickstart's cold start, so that completions end by themselves, as those
of a model worth reinforcing do; and with random weights, so that nearly all run to the limit, and a rollout that drops
what is finished has nothing to drop. Both trainers run as their users run them: a KL term against a reference (beta
0.001), DAPO's loss, one update for each rollout, AdamW; TRL with either way of transformers to compute experts.

dsv3 generates on the serving engine, as on the command line; dsv3-simple by simple generation, which needs none.

Rollout: from prompts to completions. Update: everything else but the rewards, the pass of the reference included.
Medians of a run's steps but the first; of several runs, taken in turn, the one with the fastest step counts.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contest import contest, machine

VOCABULARY = 2048
CONTENDERS = ["dsv3", "dsv3-simple", "trl-eager", "trl-grouped_mm"]
LR, BETA, LOW, HIGH = 1e-4, 0.001, 0.2, 0.28


def low_tokens(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The share of tokens in the lower half of the vocabulary: costs nothing, and differs within a group."""
    return [sum(token < VOCABULARY // 2 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def save_models(directory: Path, device: str) -> None:
    """`directory`/random/model, `directory`/trained/model and `directory`/prompts.jsonl."""
    import dsv3.backends  # noqa: F401  (it registers them)
    from dsv3 import DeepseekV3, ModelConfig
    from dsv3.core.checkpoint import save_pretrained
    from dsv3.core.tokenizer import Tokenizer
    from dsv3.quickstart.arithmetic import cold_start, problems, texts_for_tokenizer
    from dsv3.training.sft.config import SftConfig
    from dsv3.training.sft.run import sft

    tokenizer = Tokenizer.train(texts_for_tokenizer(3000, 0), VOCABULARY, single_digits=True)
    config = ModelConfig.from_pretrained("dsv3-2m").replace(vocab_size=VOCABULARY)
    model = DeepseekV3(config)
    model.init_weights(0.05, 1.0)
    save_pretrained(model, config, directory / "random" / "model", also=lambda place: tokenizer.save(place, "r1"))
    questions = [[{"role": "user", "content": problem.question}] for problem in problems(2000, False, 0)]
    _write(directory / "prompts.jsonl", [{"prompt": question} for question in questions])
    _write(directory / "traces.jsonl", cold_start(5000, 0))
    settings = {
        "run_dir": str(directory / "trained"), "model": str(directory / "random" / "model"), "steps": 100,
        "data": {"train": [str(directory / "traces.jsonl")], "seq_len": 128},
        "batch": {"samples": 48, "micro_tokens": 4096}, "optim": {"lr": 1.5e-3, "warmup_steps": 15},
        "balance": {"gamma": 0.01}, "checkpoint": {"every": 0},
    }  # fmt: skip
    sft(SftConfig.from_dict(settings), device)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class Steps:
    """What each step of a run took, by phase."""

    def __init__(self, options: argparse.Namespace):
        self.synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
        self.steps: list[dict[str, float]] = []

    def now(self) -> float:
        self.synchronize()
        return self.clock()

    def begin(self) -> None:
        self.steps.append({"rollout": 0.0, "reward": 0.0, "tokens": 0.0, "step": self.now()})

    def end(self) -> None:
        step = self.steps[-1]
        step["step"] = self.now() - step["step"]
        step["update"] = step["step"] - step["rollout"] - step["reward"]

    def timed(self, phase: str, function: Callable[..., Any], tokens: Callable[[Any], int]) -> Callable[..., Any]:
        """`function`, whose calls count as `phase`; tokens: how many its result holds."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            found = function(*args, **kwargs)
            self.steps[-1][phase] += self.now() - began
            self.steps[-1]["tokens"] += tokens(found)
            return found

        return call

    def result(self) -> dict[str, float]:
        return {key: statistics.median(step[key] for step in self.steps[1:]) for key in self.steps[0]}


def ours(directory: Path, options: argparse.Namespace, steps: Steps, engine: bool) -> None:
    import dsv3.backends  # noqa: F401  (it registers them)
    from dsv3.core.generate import generate_with
    from dsv3.serving.rollout import EngineRollout
    from dsv3.training.grpo.config import GrpoConfig
    from dsv3.training.grpo.run import GrpoRun
    from dsv3.training.loop import run_training

    if engine:
        generate_with(EngineRollout)

    class Timed(GrpoRun):
        def began(self) -> None:
            super().began()
            written = lambda groups: sum(s.written_tokens for group in groups for s in group.samples)  # noqa: E731
            self.rollouts.groups = steps.timed("rollout", self.rollouts.groups, written)  # type: ignore[method-assign]
            self.rewards.score = steps.timed("reward", self.rewards.score, lambda found: 0)  # type: ignore[method-assign]

        def optimize(self, step: int) -> dict[str, Any]:
            steps.begin()
            values = super().optimize(step)
            steps.end()
            return values

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run_dir": folder, "model": str(directory / options.model / "model"), "length": f"{options.steps} steps",
            "group_size": options.group, "prompts_per_step": options.prompts, "rewards": [{"name": "grpo:low_tokens"}],
            "data": {"prompts": [str(directory / "prompts.jsonl")]}, "rollout": {"max_tokens": options.limit},
            "loss": {"kind": "dapo", "epsilon_low": LOW, "epsilon_high": HIGH, "beta": BETA},
            "optim": {"lr": LR}, "checkpoint": {"every": 0}, "truncation_warning": 1.0,
        }  # fmt: skip
        config = GrpoConfig.from_dict(settings)
        run_training(config, options.device, lambda parallel, progress: Timed(config, parallel, progress))


def theirs(directory: Path, options: argparse.Namespace, steps: Steps, experts: str) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = [json.loads(line) for line in (directory / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(directory / options.model / "model", dtype=torch.float32)
    model.set_experts_implementation(experts)

    class Timer(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            steps.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.end()

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.group * options.prompts,
            num_generations=options.group, max_completion_length=options.limit, temperature=1.0, learning_rate=LR,
            beta=BETA, loss_type="dapo", epsilon=LOW, epsilon_high=HIGH, use_cpu=options.device == "cpu", bf16=False,
            gradient_checkpointing=False, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, low_tokens, arguments, Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(directory / options.model / "model"), callbacks=[Timer()],
        )  # fmt: skip
        trainer._generate = steps.timed("rollout", trainer._generate, lambda found: sum(map(len, found[1])))
        trainer._calculate_rewards = steps.timed("reward", trainer._calculate_rewards, lambda found: 0)
        trainer.train()


def run(name: str, options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    steps = Steps(options)
    if name.startswith("dsv3"):
        ours(options.directory, options, steps, engine=name == "dsv3")
    else:
        theirs(options.directory, options, steps, name.removeprefix("trl-"))
    result = steps.result()
    return result | {"rate": options.group * options.prompts / result["step"]}


def report(model: str, best: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    size = f"{options.prompts} prompts x {options.group} completions of at most {options.limit} tokens"
    print(f"\n{model} weights, {size}, {options.threads} thread(s), {options.clock} time")
    print("| contender | tokens of a completion | rollout s | rollout tokens/s | update s | step s |")
    print("|---|---|---|---|---|---|")
    for name, r in sorted(best.items(), key=lambda item: item[1]["step"]):
        length, speed = r["tokens"] / (options.prompts * options.group), r["tokens"] / r["rollout"]
        print(f"| {name} | {length:.1f} | {r['rollout']:.2f} | {speed:,.0f} | {r['update']:.2f} | {r['step']:.2f} |")
    mine, others = best["dsv3"], [r for name, r in best.items() if name.startswith("trl")]
    for key in ("rollout", "update", "step") if others else ():
        print(f"{key}: {min(r[key] for r in others) / mine[key]:.2f} times as fast as TRL at its best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--limit", type=int, default=48, help="tokens of a completion at most")
    parser.add_argument("--steps", type=int, default=4, help="of each run; the first does not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--model", choices=("trained", "random"), help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options.only, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), options.device)
        for model in ("trained", "random"):
            arguments = ["--directory", folder, "--model", model]
            for key in ("device", "prompts", "group", "limit", "steps", "threads", "clock"):
                arguments += [f"--{key}", str(getattr(options, key))]
            report(model, contest(__file__, CONTENDERS, options.rounds, arguments), options)
    print(machine())
    if options.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")


if __name__ == "__main__":
    main()
