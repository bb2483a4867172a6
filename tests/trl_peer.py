"""TRL's GRPOTrainer without its training: the methods that compute rewards, ratios and loss, on numbers that we give.

The object is made without `__init__`, and told only what those methods read; generation, reward functions and forward
passes are replaced by functions that return what the test wants them to.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PAD, EOS = 0, 1


@dataclass(frozen=True)
class Numbers:
    """Of B sequences, padded [B, T]. mask: 1 for tokens that count; the others of a row stand behind them."""

    logp: Tensor
    old: Tensor
    reference: Tensor
    sampling: Tensor
    entropy: Tensor
    mask: Tensor
    rewards: Tensor  # [B, functions], nan where a function does not apply
    truncated: Tensor  # bool [B]


def trainer(numbers: Numbers, group_size: int, **settings: Any) -> Any:
    """A trainer that has `numbers` for its model's and functions' answers."""
    from trl import GRPOTrainer

    functions = numbers.rewards.shape[1]
    values: dict[str, Any] = {
        "loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
        "scale_rewards": "group", "mask_truncated_completions": False, "max_completion_length": 64, "use_vllm": True,
        "vllm_importance_sampling_correction": False, "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": 3.0,
        "_entropy_bonus_enabled": False, "entropy_coef": 0.0, "reward_weights": torch.ones(functions),
        "delta": None, "use_bias_correction_kl": False,
    } | settings  # fmt: skip
    made = object.__new__(GRPOTrainer)
    arguments = {name: values.pop(name) for name in ("delta", "use_bias_correction_kl")}
    common: dict[str, Any] = {
        "args": SimpleNamespace(
            **arguments, steps_per_generation=1, gradient_accumulation_steps=1, gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=len(numbers.mask), per_device_eval_batch_size=len(numbers.mask),
        ),
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"), num_processes=1, process_index=0, sync_gradients=True, gather=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False), "ref_model": object(),
        "environment_factories": None, "environments": None, "tools": None, "num_iterations": 2,
        "pad_to_multiple_of": None, "eos_token_ids": [EOS], "_tokenizer": SimpleNamespace(pad_token_id=PAD),
        "_is_vlm": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "aux_loss_enabled": False,
        "use_adaptive_entropy": False, "current_gradient_accumulation_steps": 1, "num_generations": group_size,
        "multi_objective_aggregation": "sum_then_normalize", "_metrics": {"train": defaultdict(list)},
        "reward_funcs": [None] * functions, "reward_func_names": [f"f{i}" for i in range(functions)],
        "_logs": defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        "_pending_extra_logs": defaultdict(list), "_pending_metrics": defaultdict(list), "log_multimodal": False,
    }  # fmt: skip
    for name, value in (common | values).items():
        setattr(made, name, value)

    def forward(model: Any, *rest: Any, compute_entropy: bool = False, **kwargs: Any) -> tuple[Any, Any, None]:
        if model is made.ref_model:
            return numbers.reference, None, None
        return (numbers.logp, numbers.entropy, None) if compute_entropy else (numbers.old, None, None)

    made._get_per_token_logps_and_entropies = forward
    made._calculate_rewards = lambda *rest: numbers.rewards
    made._generate = lambda prompts: _generated(numbers)
    return made


def _generated(numbers: Numbers) -> tuple[Any, ...]:
    """Prompt ids, completion ids, tool mask, completions, sampling log-probabilities, extra fields, two for images."""
    ids, sampling = [], []
    for row, length in enumerate(numbers.mask.sum(1).int().tolist()):
        last = 7 if numbers.truncated[row] else EOS
        ids.append([5] * (length - 1) + [last])
        sampling.append(numbers.sampling[row, :length].tolist())
    texts = ["text"] * len(ids)
    return [[3]] * len(ids), ids, None, texts, sampling, {}, None, None


def loss(made: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, advantages [B] and metrics, through TRL's own path from rewards to loss."""
    count = len(made._calculate_rewards())
    inputs = made._generate_and_score_completions([{"prompt": "p"} for _ in range(count)])
    value = made._compute_loss(made.model, inputs)
    metrics = {name: values[-1] for name, values in made._metrics["train"].items()}
    return value, inputs["advantages"], metrics
