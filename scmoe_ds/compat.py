"""Every touch of a private name of torch, DeepSpeed and megatron-core: what it is for, and the version it was read in.

No other module names one; tests/test_house.py says so. megatron-core's classes whose private methods are overridden
stand in data/megatron_classes.py. docs/versions.md has the versions that were tested.

DeepSpeed is imported where it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import distributed_c10d

# Python ---------------------------------------------------------------------------------------------------------------


def before_threads_are_joined(function: Callable[[], object]) -> None:
    """Calls a function when the program ends, before executors do what is left in their queues. `atexit` calls after
    that (read in 3.11)."""
    threading._register_atexit(function)  # type: ignore[attr-defined]


# torch ----------------------------------------------------------------------------------------------------------------

_entered = threading.local()
_top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # from torch 2.8 on; read in 2.13

if _top is None:  # torch 2.6 and 2.7: the contexts themselves remember which of them is the innermost
    _enter, _leave = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__

    def _remember(self: Any) -> None:
        _enter(self)
        _entered.__dict__.setdefault("hooks", []).append(self.pack_hook)

    def _forget(self: Any, *error: object) -> None:
        _entered.hooks.pop()
        _leave(self, *error)

    # mypy: replaced on purpose.
    saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__ = _remember, _forget  # type: ignore[method-assign]


def saved_tensor_hook() -> Any:
    """The innermost hook that packs tensors for the backward pass; None outside of any. An activation checkpoint is
    such a hook, and says by its identity which one surrounds a call. In torch 2.6 and 2.7 DeepSpeed's own activation
    checkpointing is not seen."""
    if _top is None:
        stack = getattr(_entered, "hooks", None)
        return stack[-1] if stack else None
    hooks = _top(True)
    return None if hooks is None else hooks[0]


def is_recomputation(hook: Any) -> bool:
    """Whether a hook is that of a checkpoint's second pass; by its name in torch.utils.checkpoint (read in 2.13)."""
    return getattr(hook, "__qualname__", "").startswith("_recomputation_hook")


def forward_hooks(module: nn.Module) -> tuple[MutableMapping[int, Any], MutableMapping[int, Any]]:
    """The module's forward pre-hooks and forward hooks, which torch only lets one add (read in 2.13)."""
    return module._forward_pre_hooks, module._forward_hooks


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module holds, each under every name; `named_children` gives one of them (read in 2.13)."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters; `parameters(recurse=False)` leaves out None and repetitions (read in 2.13)."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers; `buffers(recurse=False)` leaves out None and repetitions (read in 2.13)."""
    return module._buffers


def storage_key(tensor: Tensor) -> int:
    """A number by which tensors with one storage are told from others while it lives (read in 2.13)."""
    return int(tensor.untyped_storage()._cdata)


def forget_load_hooks(module: nn.Module) -> None:
    """Removes what a class made to run before its state is loaded (read in 2.13)."""
    module._load_state_dict_pre_hooks.clear()


def keep_gpu_busy(cycles: int) -> None:
    """A kernel that only waits (read in 2.13)."""
    torch.cuda._sleep(cycles)


def build_directory(extension: str) -> Path:
    """Where torch compiles an extension; creates nothing (read in 2.13)."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(extension, False))


def set_default_timeout(timeout: timedelta) -> None:
    """The timeout of process groups whose makers name none: DeepSpeed's `new_group` has no argument for it (2.13)."""
    distributed_c10d.default_pg_timeout = timeout
    if distributed_c10d.default_pg_nccl_timeout is not None:
        distributed_c10d.default_pg_nccl_timeout = timeout


def default_timeout() -> timedelta:
    """What `set_default_timeout` set, or torch's own."""
    return distributed_c10d.default_pg_timeout


def set_world_timeout(timeout: timedelta) -> None:
    """The timeout of the world's group, which exists (read in 2.13)."""
    distributed_c10d._set_pg_timeout(timeout)


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """A group's timeout, to hand to gloo's sends and receives, which ignore it (read in 2.13)."""
    return group._get_backend(device).options._timeout


_aten = torch.ops.aten
flash_attention = _aten._scaled_dot_product_flash_attention
flash_attention_backward = _aten._scaled_dot_product_flash_attention_backward
efficient_attention = _aten._scaled_dot_product_efficient_attention
efficient_attention_backward = _aten._scaled_dot_product_efficient_attention_backward
fused_rms_norm = getattr(_aten, "_fused_rms_norm", None)  # from torch 2.9 on
read_scalar = _aten._local_scalar_dense.default
"""Operators that torch chooses by the device, and the one by which the host reads a value (read in 2.13)."""
int8_product, fp8_product = torch._int_mm, torch._scaled_mm
"""int8 to int32, and e4m3 with scales of rows and columns to bf16 (read in 2.13)."""


def start_fake_process_group(rank: int, ranks: int) -> None:
    """A process group whose collectives return at once and move nothing (read in 2.13)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)


# DeepSpeed ------------------------------------------------------------------------------------------------------------


def high_precision_mapping(parameter: Tensor) -> Any:
    """Where ZeRO keeps a parameter's fp32 copy and optimizer state: `hp_fragment`, `hp_fragment_address`,
    `lp_fragment_address`, `param_group_index`. None without ZeRO, or if other ranks have it (read in 0.19.8)."""
    return getattr(parameter, "_hp_mapping", None)


@contextmanager
def writes_by(engine: Any, write: Callable[[Any, str], None]) -> Iterator[None]:
    """Inside the block, DeepSpeed's checkpoint files are written by `write`, and its zero_to_fp32.py, which cannot read
    checkpoints of MoE models, is not added (read in 0.19.8)."""

    def no_script(path: str) -> None: ...

    owner = engine.checkpoint_engine
    owner.save, engine._copy_recovery_script = write, no_script
    try:
        yield
    finally:
        del owner.save, engine._copy_recovery_script  # the classes' own show again


@contextmanager
def reads_by(engine: Any, read: Callable[..., Any], model_files: list[str]) -> Iterator[None]:
    """Inside the block, DeepSpeed's checkpoint files are read by `read`, and the model's are these: DeepSpeed searches
    for them by a pattern, in which a "[" of the directory's name has a meaning (read in 0.19.8)."""
    owner = engine.checkpoint_engine
    owner.load, engine._get_all_ckpt_names = read, lambda load_dir, tag: model_files
    try:
        yield
    finally:
        del owner.load, engine._get_all_ckpt_names  # the classes' own show again


def disable_shared_memory() -> None:
    """CPU ranks of one host reduce through torch instead of DeepSpeed's shared memory (read in 0.19.8)."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def weighted_restore() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """DeepSpeed's Triton kernel that weights the rows of a token and adds them up: (rows [R, D], row of each choice
    [T, K] or -1, fp32 weights [T, K]) → [T, D]. Its gradient leaves out rows without a choice. None: there is none. The
    public function around it does not know dropped choices (read in 0.19.8, the first with it)."""
    try:
        from deepspeed.ops.triton_ops import autoep_fused_token_ops
    except ImportError:
        return None
    restore = getattr(autoep_fused_token_ops, "_FusedWeightedRestore", None)
    known = ["ctx", "combined_rows", "top_scores", "inverse", "top_k"]
    if restore is None or list(signature(restore.forward).parameters) != known:
        return None
    if not autoep_fused_token_ops.is_available():
        return None
    return lambda rows, row_TK, weight_TK: restore.apply(rows, weight_TK, row_TK.flatten(), row_TK.shape[1])


def forget_process_groups() -> None:
    """Makes DeepSpeed forget every group, so that the process can start another layout (read in 0.19.8)."""
    from deepspeed.utils import groups

    if hasattr(groups, "_release_process_group_references"):  # from DeepSpeed 0.19.8 on
        groups._release_process_group_references()
        return
    for name, value in vars(groups).items():
        if name.startswith(("_EXPERT_", "_ALL_TO_ALL_")):
            value.clear()
    groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = groups.mesh_device = groups.mpu = None
    groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = groups._DATA_PARALLEL_GROUP = None
    groups._MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE = groups._MPU_TENSOR_MODEL_PARALLEL_RANK = None
    groups.expert_tensor_parallel_world_size = 1


def build_autoep_layers_as(preset: str, kind: type) -> None:
    """Where AutoEP would build an `AutoEPMoELayer` for a preset, it builds this subclass (read in 0.19.8)."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    kinds = getattr(AutoEPMoELayer, "kinds_by_preset", None)
    if kinds is None:
        kinds = AutoEPMoELayer.kinds_by_preset = {}

        def new(cls: type, spec: Any = None, *args: Any, **kwargs: Any) -> Any:
            return object.__new__(kinds.get(getattr(spec, "model_family", None), cls) if cls is AutoEPMoELayer else cls)

        AutoEPMoELayer.__new__ = staticmethod(new)
    kinds[preset] = kind


_REMOVED = (
    "nebula compression_training amp quantize_training sparse_gradients eigenvalue sparse_attention elasticity "
    "graph_harvesting curriculum_learning progressive_layer_drop"
)
_REMOVED_ZERO = "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param"


def removed_keys() -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Keys that DeepSpeed's JSON no longer has, at the top and in "zero_optimization", with what it says about them;
    0.19.7 is the first to say it. Before, the same keys, so that a JSON holds for all versions (read in 0.19.8)."""
    from deepspeed.runtime import config

    names = {"_REMOVED_TOP_LEVEL_CONFIG_KEYS": _REMOVED, "_REMOVED_ZERO_CONFIG_KEYS": _REMOVED_ZERO}
    top, zero = (
        getattr(config, name, dict.fromkeys(keys.split(), "DeepSpeed 0.19.7 has removed it"))
        for name, keys in names.items()
    )
    return top, zero


def register_autoep_adapter(name: str, adapter: Any) -> None:
    """An adapter of a preset for AutoEP's registry, which only lists its own (read in 0.19.8)."""
    from deepspeed.module_inject.auto_ep_presets import registry

    registry._PRESET_ADAPTERS[name] = adapter


def allow_frozen_experts() -> None:
    """ZeRO-1 and 2 refuse an optimizer without experts where a model has some. Afterwards they take it as one of dense
    parameters, which it is where all experts are frozen (read in 0.19.8)."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as kind

    configure = kind._configure_moe_settings
    if getattr(configure, "allows_frozen_experts", False):
        return

    def configure_if_any(self: Any) -> None:
        self.has_moe_layers = any(self.is_moe_group(group) for group in self.optimizer.param_groups)
        if self.has_moe_layers:
            configure(self)

    configure_if_any.allows_frozen_experts = True  # type: ignore[attr-defined]
    kind._configure_moe_settings = configure_if_any


# megatron-core --------------------------------------------------------------------------------------------------------


def sequences_of(dataset: Any, sample: int) -> Any:
    """The sequences that a sample of a GPTDataset was cut from. 0.14–0.16 return two values, 0.19 three (read in
    0.16.1 and 0.19.2)."""
    _, sequences, *_ = dataset._query_document_sample_shuffle_indices(sample)
    return sequences
