"""The passes over samples that an update is made of: old and reference log-probabilities, then forward and backward.

Samples are packed end to end without padding, neighbours in length together, at most `micro_batch_tokens` at a time;
the head runs only where the model wrote, and its logits are never kept (`linear_cross_entropy`).

Routing replay: the gates of a mixture of experts choose a little differently in every pass, by rounding alone, and
much differently once the weights have moved; a ratio of probabilities then compares two different networks. With
replay, the update uses the experts of the rollout (R3) or of the pass before the first update (R2). Only the selection
is replayed: gate values are computed from all scores of today, so that the router goes on learning, and an expert that
today's gate would not choose has the weight that its score says.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.model import DeepseekV3
from ...core.moe import Gate
from ...core.step import Routing, packed
from ...ops.loss import linear_cross_entropy
from ..balance import Balancer
from .config import GrpoConfig
from .loss import BatchSize, Tokens, policy_loss
from .sample import Sample
from .tally import Tally


@dataclass(frozen=True)
class Pack:
    """Samples end to end. tokens, positions i64 [T]: all of each but its last token; cu_seqlens i32 [B + 1]. rows i64
    [N]: places whose next token the model wrote; targets i64 [N], that token; sequence i64 [N], whose it is.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_len: int
    rows: Tensor
    targets: Tensor
    sequence: Tensor


def pack(samples: Sequence[Sample], device: torch.device) -> Pack:
    tokens: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    for number, sample in enumerate(samples):
        first = len(tokens) + sample.prompt_length - 1
        own = [place for place, written in enumerate(sample.written) if written]
        tokens += sample.token_ids[:-1]
        rows += [first + place for place in own]
        targets += [sample.token_ids[sample.prompt_length + place] for place in own]
        sequence += [number] * len(own)
    positions, cu_seqlens, max_len = packed([len(sample.token_ids) - 1 for sample in samples], device=device)
    flat = [torch.tensor(values, device=device) for values in (tokens, rows, targets, sequence)]
    return Pack(flat[0], positions, cu_seqlens, max_len, *flat[1:])


def micro_batches(samples: Sequence[Sample], tokens: int) -> Iterator[list[Sample]]:
    """Samples in order of length, at most so many tokens at a time but at least one sample."""
    batch: list[Sample] = []
    size = 0
    for sample in sorted(samples, key=lambda sample: len(sample.token_ids)):
        length = len(sample.token_ids) - 1
        if batch and size + length > tokens:
            yield batch
            batch, size = [], 0
        batch.append(sample)
        size += length
    if batch:
        yield batch


def score(model: DeepseekV3, pack: Pack, temperature: float, routing: Routing | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability of every token that was written, and entropy of its distribution, f32 [N] each."""
    step = model.step(pack.positions, pack.cu_seqlens, pack.max_len, routing=routing, limit=pack.max_len)
    hidden = model.model.norm(model.blocks(model.embed(pack.tokens), step)).index_select(0, pack.rows)
    logp, entropy, _ = linear_cross_entropy(hidden, model.head_weight.to(hidden.dtype), pack.targets, temperature)
    return logp, entropy


def make_reference(model: DeepseekV3) -> DeepseekV3:
    """A copy that does not train, without the MTP modules."""
    reference = deepcopy(model).requires_grad_(False).eval()
    for layer in range(model.config.num_hidden_layers, model.config.num_layers_with_mtp):
        del reference.model.layers[str(layer)]
    return reference


class Learner:
    """Computes the gradients of a batch. reference: None where the loss has no KL term."""

    def __init__(self, model: DeepseekV3, reference: DeepseekV3 | None, config: GrpoConfig, balancer: Balancer | None):
        self.model, self.reference, self.config, self.balancer = model, reference, config, balancer
        self.device = model.model.embed_tokens.weight.device
        self.layers = [module.layer for module in model.modules() if isinstance(module, Gate)]
        self.layers = sorted(layer for layer in self.layers if layer < model.config.num_hidden_layers)

    def learns_from(self, sample: Sample) -> bool:
        """Does the sample count in the loss?"""
        return sample.written_tokens > 0 and not (self.config.loss.mask_truncated and sample.truncated)

    def has_gradient(self, sample: Sample) -> bool:
        """An advantage of 0 alone moves nothing: such samples are counted, but not computed."""
        settings = self.config.loss
        others = settings.beta or settings.entropy_coef or self.config.balance.alpha
        return self.learns_from(sample) and bool(sample.advantage or others)

    @torch.no_grad()
    def prepare(self, samples: Sequence[Sample]) -> None:
        """Note the log-probabilities of the policy, where more than one update will move it away from them, and those
        of the reference. Under R2 the experts of this pass are noted, too.
        """
        wanted = [sample for sample in samples if self.has_gradient(sample)]
        for batch in micro_batches(wanted, self.config.micro_batch_tokens):
            packed_batch = pack(batch, self.device)
            counts = [sample.written_tokens for sample in batch]
            if self.config.updates_per_step > 1:
                routing = self._routing(batch)
                logp, _ = score(self.model, packed_batch, self.config.rollout.temperature, routing)
                for sample, part in zip(batch, logp.split(counts), strict=True):
                    sample.old_logp = part
                if self.config.replay == "old" and routing is not None:
                    self._note_experts(batch, routing)
            if self.reference is not None:
                logp, _ = score(self.reference, packed_batch, self.config.rollout.temperature)
                for sample, part in zip(batch, logp.split(counts), strict=True):
                    sample.reference_logp = part

    def backward(self, samples: Sequence[Sample], size: BatchSize) -> tuple[float, Tally]:
        """Add the gradients of these samples' share in the loss; returns that share, and what to log."""
        total, tally = 0.0, Tally()
        if self.balancer is not None:  # there may be no sample at all on this process
            experts = self.model.config.n_routed_experts
            self.balancer.add({layer: torch.zeros(experts, device=self.device) for layer in self.balancer.layers})
        wanted = [sample for sample in samples if self.has_gradient(sample)]
        for batch in micro_batches(wanted, self.config.micro_batch_tokens):
            packed_batch = pack(batch, self.device)
            routing = self._routing(batch) or Routing()
            alpha = self.config.balance.alpha
            routing.balance_sequences = packed_batch.cu_seqlens if alpha else None
            logp, entropy = score(self.model, packed_batch, self.config.rollout.temperature, routing)
            loss, part = policy_loss(self._tokens(batch, packed_batch, logp, entropy), size, self.config.loss)
            if alpha:
                balance = sum(routing.balance.values(), torch.zeros_like(loss))
                loss = loss + alpha * balance * (len(batch) / size.sequences)
            loss.backward()
            total += float(loss.detach())
            tally.merge([part])
            if self.balancer is not None and routing.counts:
                self.balancer.add(routing.counts)
        return total, tally

    def _tokens(self, batch: Sequence[Sample], packed_batch: Pack, logp: Tensor, entropy: Tensor) -> Tokens:
        def column(parts: list[Tensor | None]) -> Tensor | None:
            known = [part for part in parts if part is not None]
            return torch.cat(known) if known else None

        sampled = [logprob for sample in batch for logprob in sample.written_logprobs]
        return Tokens(
            packed_batch.sequence,
            torch.tensor([sample.advantage for sample in batch], dtype=torch.float32, device=self.device),
            logp,
            entropy,
            column([sample.old_logp for sample in batch]),
            column([sample.reference_logp for sample in batch]),
            torch.tensor(sampled, dtype=torch.float32, device=self.device),
        )

    def _routing(self, batch: Sequence[Sample]) -> Routing | None:
        """What the gates are told, and where they write what they chose."""
        if self.config.replay == "none" or not self.layers:
            return None
        if any(sample.experts is None for sample in batch):
            return Routing()
        chosen = torch.cat([sample.experts for sample in batch if sample.experts is not None]).to(self.device)
        return Routing(
            replay={layer: part.contiguous() for layer, part in zip(self.layers, chosen.unbind(1), strict=True)}
        )

    def _note_experts(self, batch: Sequence[Sample], routing: Routing) -> None:
        chosen = torch.stack([routing.experts[layer] for layer in self.layers], 1)  # [T, layers, k]
        for sample, part in zip(batch, chosen.split([len(sample.token_ids) - 1 for sample in batch]), strict=True):
            sample.experts = part
