"""Experts that are not divided, in a model whose other layers are divided between tensor-parallel ranks."""

from __future__ import annotations

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.experts import count_on_all_ranks


def prepare_whole_experts(model: nn.Module, config: ScMoEConfig) -> None:
    """Marks whole experts, so that DeepSpeed counts every tensor-parallel rank's in the gradient norm.

    Raises:
        ScMoEConfigError: DeepSpeed's own layers on gloo.
    """
    if not config.is_scheduled and dist.get_backend() == "gloo":
        instead = "pipelined_topk" if config.architecture == "topk" else "overlapped_shared_expert"
        raise ScMoEConfigError(
            f'scmoe.architecture = "{config.architecture}": DeepSpeed\'s own layer gathers tokens of tensor-parallel '
            f'ranks in a way that gloo refuses; use "{instead}", the same layer of this package, or a tensor-parallel '
            "size of 1"
        )
    for module in model.modules():
        if isinstance(module, MoE):
            count_on_all_ranks(module.deepspeed_moe.experts)
