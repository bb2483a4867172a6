"""DeepEP dd758ca: deep_ep.Buffer, of the low-latency kernels, over a process group of any transport."""

import os

import torch
import torch.distributed as dist

topk_idx_t = torch.int64
HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
made: list["Buffer"] = []


def _everyones(value, group):
    gathered = [None] * group.size()
    dist.all_gather_object(gathered, value, group)
    return gathered


class Buffer:
    hidden = HIDDEN  # tests add small ones

    def __init__(
        self,
        group,
        num_nvl_bytes=0,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=24,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=False,
        enable_shrink=False,
        comm=None,
    ):
        self.group, self.bytes, self.qps = group, num_rdma_bytes, num_qps_per_rank
        self.low_latency, self.destroyed, self.next = low_latency_mode, False, 0
        self.explicitly_destroy = explicitly_destroy
        self.depth = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
        made.append(self)

    def destroy(self):
        assert self.explicitly_destroy
        self.destroyed = True

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts):
        message = 2 * hidden + hidden // 128 * 4 + 16
        return 4 * num_experts * num_max_dispatch_tokens_per_rank * message + 256 * num_experts

    def _check(self, bound, hidden, experts, topk_idx):
        assert self.low_latency and not self.destroyed and self.depth >= (bound + 1) * 2
        ranks = self.group.size()
        assert self.get_low_latency_rdma_size_hint(bound, hidden, ranks, experts) <= self.bytes
        assert experts % ranks == 0 and self.qps >= experts // ranks and hidden in self.hidden
        assert topk_idx.dtype == topk_idx_t and topk_idx.dim() == 2 and topk_idx.is_contiguous()
        assert topk_idx.shape[0] <= bound and topk_idx.shape[1] <= 11
        self.next ^= 1

    def low_latency_dispatch(
        self,
        x,
        topk_idx,
        num_max_dispatch_tokens_per_rank,
        num_experts,
        cumulative_local_expert_recv_stats=None,
        dispatch_wait_recv_cost_stats=None,
        use_fp8=True,
        round_scale=False,
        use_ue8m0=False,
        async_finish=False,
        return_recv_hook=False,
    ):
        bound, (tokens, hidden), ranks, rank = (
            num_max_dispatch_tokens_per_rank,
            x.shape,
            self.group.size(),
            self.group.rank(),
        )
        self._check(bound, hidden, num_experts, topk_idx)
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and tokens == topk_idx.shape[0] and not use_fp8
        assert ranks * bound % 4 == 0 and not async_finish and not return_recv_hook
        local, generator = num_experts // ranks, torch.Generator().manual_seed(rank)
        received = torch.full((local, ranks * bound, hidden), torch.nan, dtype=x.dtype)
        source = torch.full((local, ranks * bound), 2**31 - 1, dtype=torch.int32)
        layout = torch.zeros(local, ranks, 2, dtype=torch.int32)
        counts = torch.zeros(local, dtype=torch.int32)
        sent = _everyones((x, topk_idx), self.group)
        for expert in range(local):
            for sender in torch.randperm(ranks, generator=generator).tolist():  # in the order of arrival
                rows, chosen = sent[sender]
                mine = (chosen == rank * local + expert).any(1).nonzero()[:, 0]
                mine = mine[torch.randperm(len(mine), generator=generator)]
                begin = int(counts[expert])
                received[expert, begin : begin + len(mine)] = rows[mine]
                source[expert, begin : begin + len(mine)] = mine.int()
                layout[expert, sender] = torch.tensor([len(mine), begin])
                counts[expert] += len(mine)
        handle = source, layout.view(torch.int64).squeeze(-1), bound, hidden, num_experts
        return received, counts, handle, None, None

    def low_latency_combine(
        self,
        x,
        topk_idx,
        topk_weights,
        handle,
        use_logfmt=False,
        zero_copy=False,
        async_finish=False,
        return_recv_hook=False,
        out=None,
        combine_wait_recv_cost_stats=None,
    ):
        source, layout, bound, hidden, experts = handle
        ranks, local = self.group.size(), experts // self.group.size()
        self._check(bound, hidden, experts, topk_idx)
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and tuple(x.shape) == (local, ranks * bound, hidden)
        assert topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape
        assert source.dtype == torch.int32 and source.is_contiguous() and source.shape[0] == local
        assert layout.dtype == torch.int64 and layout.is_contiguous() and tuple(layout.shape) == (local, ranks)
        assert not (use_logfmt or zero_copy or async_finish or return_recv_hook) and out is None
        answers = []  # for each rank: its tokens' rows, by token and expert
        for receiver in range(ranks):
            rows = {}
            for expert in range(local):
                count, begin = layout.view(torch.int32).view(local, ranks, 2)[expert, receiver].tolist()
                for row in range(begin, begin + count):
                    rows[int(source[expert, row]), self.group.rank() * local + expert] = x[expert, row].clone()
            answers.append(rows)
        mine = {}
        for one in _everyones(answers, self.group):
            mine |= one[self.group.rank()]
        combined = torch.zeros(*topk_idx.shape[:1], hidden)
        for token, choices in enumerate(topk_idx.tolist()):
            for j, expert in enumerate(choices):
                combined[token] += mine[token, expert].float() * topk_weights[token, j]
        return combined.to(x.dtype), None, None
