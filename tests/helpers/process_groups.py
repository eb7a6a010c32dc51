"""DeepSpeed's memory of process groups, which outlives the groups themselves."""

from deepspeed.utils import groups


def forget_process_groups() -> None:
    """Makes DeepSpeed forget every group, so that the process can start another layout."""
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
