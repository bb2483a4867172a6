"""FlashInfer fb28d72 (0.6.18): flashinfer.mla. Plans are counted."""

import torch

from dsv3.ops.mla_cache import mla_decode

plans = 0


class BatchMLAPagedAttentionWrapper:
    def __init__(
        self,
        float_workspace_buffer,
        use_cuda_graph=False,
        qo_indptr=None,
        kv_indptr=None,
        kv_indices=None,
        kv_len_arr=None,
        backend="auto",
    ):
        assert float_workspace_buffer.nbytes >= 128 * 2**20 and not use_cuda_graph

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
        use_profiler=False,
    ):
        global plans
        plans += 1
        for host in (qo_indptr, kv_indptr, kv_len_arr):
            assert host.device.type == "cpu" and host.dtype == torch.int32 and host.is_contiguous()
        assert kv_indices.dtype == torch.int32 and kv_indices.dim() == 1 and kv_indices.is_contiguous()
        assert (head_dim_ckv, head_dim_kpe) == (512, 64) and causal is True
        assert q_data_type in (torch.bfloat16, torch.float16) and kv_data_type == q_data_type
        assert len(qo_indptr) == len(kv_indptr) == len(kv_len_arr) + 1
        self.queries, self.begins, self.lens = qo_indptr.tolist(), kv_indptr.tolist(), kv_len_arr.tolist()
        self.indices, self.heads, self.page, self.scale = kv_indices, num_heads, page_size, sm_scale
        self.dtype = q_data_type

    def run(
        self,
        q_nope,
        q_pe,
        ckv_cache,
        kpe_cache,
        out=None,
        lse=None,
        return_lse=False,
        profiler_buffer=None,
        kv_len=None,
        page_table=None,
        return_lse_base_on_e=False,
    ):
        n = self.queries[-1]
        assert tuple(q_nope.shape) == (n, self.heads, 512) and tuple(q_pe.shape) == (n, self.heads, 64)
        assert tuple(ckv_cache.shape[1:]) == (self.page, 512) and tuple(kpe_cache.shape[1:]) == (self.page, 64)
        for x in (q_nope, q_pe, ckv_cache, kpe_cache):
            assert x.dtype == self.dtype and x.stride(-1) == 1
        assert tuple(out.shape) == tuple(q_nope.shape) and out.dtype == self.dtype
        assert return_lse and tuple(lse.shape) == (n, self.heads) and lse.dtype == torch.float32
        q, pages = torch.cat([q_nope, q_pe], -1), torch.cat([ckv_cache, kpe_cache], -1)
        for i, length in enumerate(self.lens):
            rows = slice(self.queries[i], self.queries[i + 1])
            assert length >= rows.stop - rows.start  # queries without a key are not this library's
            used = self.indices[self.begins[i] : self.begins[i] + -(-length // self.page)][None]
            known = torch.tensor([length], dtype=torch.int32)
            result = mla_decode.spec(q[rows][None], [pages], used, known, known, [], self.scale, 512)
            out[rows], lse[rows] = result[0][0], result[1][0]
        if not return_lse_base_on_e:
            lse *= 1.4426950408889634
        return out, lse
