"""Tensor parallelism of a model's modules: each rank computes with its share, and the results are brought together.

Put on from outside: sums and gathers are hooks behind ordinary modules, which know nothing of them.
"""

import torch
from torch import Tensor, nn

from ..core.fp8_checkpoint import require_block_edges
from ..core.linear import Embedding, Linear
from ..ops.collectives import all_gather, all_reduce
from .mesh import Mesh
from .share import Cut, Share


class VocabularyParallelEmbedding(Embedding):
    """Rows of a share of the vocabulary, summed with the others': every token has its row on one rank.

    first: the first token of the share. group: name of the process group.
    """

    def __init__(self, base: Embedding, first: int, group: str):
        nn.Module.__init__(self)
        self.weight, self.first, self.group = base.weight, first, group

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.first
        mine = (local >= 0) & (local < self.weight.shape[0])
        rows = super().forward(torch.where(mine, local, 0))
        return all_reduce(rows.masked_fill(~mine[..., None], 0), self.group)


def cut_module(module: nn.Module, name: str, share: Share) -> None:
    """Leave `module`, whose name is `name`, its share of its weight. UserError where that cuts through FP8 blocks."""
    weight = getattr(module, "weight", None)
    cut = share.cut(name + ".weight") if isinstance(weight, nn.Parameter) else None
    if weight is None or cut is None:
        return
    if isinstance(module, Linear) and module.weight_scale_inv is not None:
        _require_whole_blocks(weight, cut, name)
        scale = cut.of(module.weight_scale_inv)
        module.load_fp8(cut.of(weight.detach()), scale, module.power_of_two_scales)
        return
    module.weight = nn.Parameter(cut.of(weight.detach()), requires_grad=weight.requires_grad)
    if isinstance(module, Linear):
        module.refresh()


def _require_whole_blocks(weight: Tensor, cut: Cut, name: str) -> None:
    if weight.dim() == 2:  # routed experts are not cut
        size = weight.shape[cut.dim] // cut.bands
        require_block_edges(name, size, *cut.span(size))


def sum_behind(module: nn.Module, group: str) -> None:
    """What `module` returns is the sum over the ranks of `group` from now on."""
    module.register_forward_hook(lambda module, inputs, output: all_reduce(output, group))


def gather_behind(head: nn.Module, mesh: Mesh) -> None:
    """The logits of all ranks' shares of the vocabulary, [T, V / tp] each -> [T, V] on every one."""

    def gather(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = output.reshape(-1, output.shape[-1])
        gathered = all_gather(rows, mesh.tp_group).view(mesh.tp, *rows.shape)
        return gathered.transpose(0, 1).reshape(*output.shape[:-1], -1)

    head.register_forward_hook(gather)
