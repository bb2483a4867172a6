"""DeepSeekMoE (report, section 2.1.2): many small routed experts, a few of them per token, and shared ones for all.

Balance comes from a bias per expert that takes part in the selection only (auxiliary-loss-free balancing); who updates
it is the training's affair. Where the experts live is the dispatcher's: the model only says who goes where.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..ops.gemm import gemm
from ..ops.general import swiglu
from ..ops.moe import expert_count, permute, route, sequence_balance_loss, unpermute
from ..ops.weight import Quantized
from .config import ModelConfig
from .linear import GroupedLinear, Linear
from .step import Routing, Step


class MLP(nn.Module):
    """x [T, D] -> down(silu(gate(x)) * up(x)) [T, D]; gate and up are one matrix [2I, D], gate first."""

    def __init__(
        self, hidden: int, intermediate: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.gate_up_proj = Linear((2 * intermediate, hidden), device, dtype)
        self.down_proj = Linear((hidden, intermediate), device, dtype)

    def readers(self) -> tuple[Linear, ...]:
        """The products that read x."""
        return (self.gate_up_proj,)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x), None))


class Experts(nn.Module):
    """The routed experts of a layer on this process: rows [R, D] sorted by expert at `offsets` i32 [E+1] -> [R, D]."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        count, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = GroupedLinear((count, 2 * inner, hidden), device, dtype)
        self.down_proj = GroupedLinear((count, hidden, inner), device, dtype)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(rows, offsets), None), offsets)

    def masked(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [E, C, D], of which the first counts[e] (i32 [E]) are expert e's -> [E, C, D]; the other rows are 0.

        Shapes that do not depend on who goes where: for decoding steps that are captured. Has no gradient.
        """
        gate_up = self.gate_up_proj.masked(rows, counts)
        return self.down_proj.masked(swiglu(gate_up.flatten(0, 1), None).unflatten(0, rows.shape[:2]), counts)


class Dispatcher(Protocol):
    """Brings tokens to their experts and the weighted sums of the results back."""

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, compute: Experts) -> Tensor:
        """x [T, D], experts i32 [T, k], weights f32 [T, k] -> sum over k of weight * expert(x) [T, D]."""


class LocalDispatcher:
    """All experts are on this process: sort the tokens by expert, compute, and sum.

    align: rows of an expert begin at multiples of it; grouped products in FP8 want 128 on GPUs.
    """

    def __init__(self, num_experts: int, align: int = 1):
        self.num_experts, self.align = num_experts, align

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, compute: Experts) -> Tensor:
        rows, row_map, offsets = permute(x, experts, self.num_experts, self.align)
        return unpermute(compute(rows, offsets), row_map, weights)


class Gate(nn.Module):
    """Router logits in float32, and who goes where. `e_score_correction_bias`, the balancing bias, is no parameter."""

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config, self.layer = config, layer
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, device=device, dtype=dtype))
        bias = (
            torch.zeros(config.n_routed_experts, device=device, dtype=torch.float32) if config.has_gate_bias else None
        )
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """The bias moves to other devices with the rest, but stays float32: `model.bfloat16()` is not meant for it."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def forward(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """x [T, D] -> experts i32 [T, k], weights f32 [T, k]."""
        c, log = self.config, step.routing
        logits = gemm(x.float(), self.weight.float())  # [T, E]
        forced = log.replay.get(self.layer) if log is not None and log.replay is not None else None
        experts, weights = route(
            logits,
            self.e_score_correction_bias,
            c.num_experts_per_tok,
            1 if c.topk_method == "greedy" else c.n_group,
            1 if c.topk_method == "greedy" else c.topk_group,
            c.scoring_func,
            "top2" if c.topk_method == "noaux_tc" else "max",
            c.norm_topk_prob,
            c.routed_scaling_factor,
            forced,
        )
        if log is not None:
            self._record(log, logits, experts)
        return experts, weights

    def _record(self, log: Routing, logits: Tensor, experts: Tensor) -> None:
        """The first pass counts. A recomputation must still do what it did, or autograd finds other tensors saved."""
        count = self.config.n_routed_experts
        log.experts.setdefault(self.layer, experts)
        log.counts.setdefault(self.layer, expert_count(experts, count))
        if log.balance_sequences is not None:
            loss = sequence_balance_loss(logits, experts, log.balance_sequences, self.config.scoring_func)
            log.balance.setdefault(self.layer, loss)


class MoE(nn.Module):
    """x [T, D] -> sum of the chosen experts, weighted, plus the shared experts [T, D]."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.gate = Gate(config, layer, device, dtype)
        self.experts = Experts(config, device, dtype)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts, device, dtype)
            if config.n_shared_experts
            else None
        )
        self.dispatcher: Dispatcher = LocalDispatcher(config.n_routed_experts)

    def readers(self) -> tuple[Linear, ...]:
        """The products that read x as it is handed to them; gate and dispatcher take real rows."""
        return () if self.shared_experts is None else self.shared_experts.readers()

    def forward(self, x: Tensor, for_readers: Tensor | Quantized, step: Step) -> Tensor:
        """for_readers: x as `readers` want it."""
        experts, weights = self.gate(x, step)
        y = self.dispatcher(x, experts, weights, self.experts)
        return y if self.shared_experts is None else y + self.shared_experts(for_readers)
