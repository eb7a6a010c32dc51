"""Names that users of other tools type, each with what it is called here. docs/from_megatron_deepspeed.md shows them.

Megatron-DeepSpeed's own flags are in `megatron` and `megatron_refused`.
"""

from __future__ import annotations

from scmoe_ds.programs.flags.megatron import SECTION_FLAGS, section_flag

_BY_TOOL = {
    "Megatron-core": """
        moe-router-topk: --topk
        moe-layer-freq: --expert-interval
        expert-model-parallel-size: --moe-expert-parallel-size
        expert-tensor-parallel-size: --enable-expert-tensor-parallelism
        moe-aux-loss-coeff: --moe-loss-coeff
        moe-expert-capacity-factor: --moe-train-capacity-factor
        num-query-groups: --num-key-value-heads
        group-query-attention: --num-key-value-heads
        norm-epsilon: --layernorm-epsilon
        log-throughput: every line of the log has tokens per second and TFLOP/s
        context-parallel-size: one rank holds whole sequences
        moe-input-jitter-eps: "noisy_gate_policy": "Jitter" in the JSON's "scmoe" section
        moe-pad-expert-input-to-capacity: "dispatch": "padded" in the JSON's "scmoe" section
        moe-token-drop-policy: --moe-train-capacity-factor and --disable-moe-token-dropping decide
        moe-token-dispatcher-type: "all_to_all" in the JSON's "scmoe" section
        moe-grouped-gemm: GPUs compute experts grouped where that is faster
        moe-shared-expert-overlap: overlap is on; "overlap" in the JSON's "scmoe" section decides
        overlap-moe-expert-parallel-comm: overlap is on; "overlap" in the JSON's "scmoe" section decides
        overlap-grad-reduce: "overlap_comm" in the JSON's "zero_optimization"
        overlap-param-gather: "overlap_comm" in the JSON's "zero_optimization"
        attention-backend: torch chooses the fastest attention
        ckpt-format: checkpoints are DeepSpeed's
        dist-ckpt-format: checkpoints are DeepSpeed's
        use-mcore-models: the model is scmoe_ds.models.gpt
        export-kd-teacher-load: --distill-from
        mock-data: leave out --data-path: a corpus is made
        """,
    "Hugging Face's TrainingArguments and generate": """
        per-device-train-batch-size: --micro-batch-size
        per-gpu-train-batch-size: --micro-batch-size
        per-device-eval-batch-size: --micro-batch-size
        gradient-accumulation-steps: "gradient_accumulation_steps" in the DeepSpeed JSON, or --global-batch-size
        learning-rate: --lr
        lr-scheduler-type: --lr-decay-style
        warmup-steps: --lr-warmup-iters
        warmup-ratio: --lr-warmup-fraction
        adam-epsilon: --adam-eps
        max-grad-norm: --clip-grad
        optim: --optimizer
        output-dir: --save
        overwrite-output-dir: --auto-resume
        resume-from-checkpoint: --auto-resume
        save-steps: --save-interval
        save-total-limit: --keep-last
        logging-steps: --log-interval
        logging-dir: --tensorboard-dir
        report-to: --tensorboard-dir and --wandb-project, or "tensorboard" and "wandb" in the DeepSpeed JSON
        eval-steps: --eval-interval
        max-steps: --train-iters
        num-train-epochs: --train-iters or --train-tokens say how long a run is
        gradient-checkpointing: --recompute-granularity
        dataloader-num-workers: --num-workers
        max-seq-length: --seq-length
        block-size: --seq-length
        model-max-length: --seq-length
        train-file: --data-path names what scmoe preprocess has made of it
        validation-file: --valid-data-path names what scmoe preprocess has made of it
        dataset-name: --data-path names what scmoe preprocess has made of it
        tokenizer-name: --tokenizer-model
        model-name-or-path: --load
        torch-dtype: --dtype
        max-length: --max-new-tokens
        max-tokens: --max-new-tokens
        do-sample: --temperature
        num-hidden-layers: --num-layers
        intermediate-size: --ffn-hidden-size
        num-local-experts: --num-experts
        num-experts-per-tok: --topk
        moe-intermediate-size: --moe-ffn-hidden-size
        routed-scaling-factor: --moe-router-topk-scaling-factor
        n-group: --moe-router-num-groups
        topk-group: --moe-router-group-topk
        router-aux-loss-coef: --moe-loss-coeff
        rope-theta: --rotary-base
        tie-word-embeddings: embeddings are tied; --untie-embeddings-and-output-weights unties them
        """,
    "DeepSpeed, DeepSpeedExamples and the JSON": """
        train-batch-size: --global-batch-size
        train-micro-batch-size-per-gpu: --micro-batch-size
        gradient-clipping: --clip-grad
        steps-per-print: --log-interval
        stage: --zero-stage
        zero: --zero-stage
        offload: --cpu-optimizer
        scheduler: --lr-decay-style
        dtype: --bf16 or --fp16, or "bf16" and "fp16" in the DeepSpeed JSON
        precision: --bf16 or --fp16, or "bf16" and "fp16" in the DeepSpeed JSON
        fp32: fp32 is what neither "bf16" nor "fp16" in the DeepSpeed JSON asks for
        wall-clock-breakdown: "wall_clock_breakdown" in the DeepSpeed JSON
        flops-profiler: "flops_profiler" in the DeepSpeed JSON
        deepspeed-transformer-kernel: torch chooses the fastest attention
        moe: the MoE is always on; --num-experts and --topk set it
        ep-size: --moe-expert-parallel-size
        ep-world-size: --moe-expert-parallel-size
        moe-param-group: experts always have groups of their own
        noisy-gate-policy: "noisy_gate_policy" in the JSON's "scmoe" section
        """,
    "other spellings": """
        epochs: --train-iters or --train-tokens say how long a run is
        steps: --train-iters
        iterations: --train-iters
        num-steps: --train-iters
        layers: --num-layers
        n-layer: --num-layers
        n-layers: --num-layers
        n-head: --num-attention-heads
        n-heads: --num-attention-heads
        num-heads: --num-attention-heads
        n-embd: --hidden-size
        d-model: --hidden-size
        embed-dim: --hidden-size
        experts: --num-experts
        num-expert: --num-experts
        sequence-length: --seq-length
        seq-len: --seq-length
        context-length: --seq-length
        batch: --micro-batch-size
        bs: --micro-batch-size
        wd: --weight-decay
        tp: --tensor-model-parallel-size
        tensor-parallel-size: --tensor-model-parallel-size
        ep: --moe-expert-parallel-size
        pp: a shortcut may not cross a pipeline stage
        config: --deepspeed_config
        ds-config: --deepspeed_config
        checkpoint: --load
        resume: --auto-resume
        output: --save
        input: --data-path names what scmoe preprocess has made of it
        data: --data-path
        data-dir: --data-path
        workers: --num-workers
        dropout: --hidden-dropout
        trace: --scmoe-trace
        profile: --scmoe-trace
        teacher: --distill-from
        teacher-model: --distill-from
        """,
}
_NO_FLAG = """
    first_layer_position shortcut_distance pairs_per_moe use_rts gate_softmax shortcut_norm post_norm dispatch
    all_to_all wire_dtype replace tap shared_from overlap router num_chunks calibration_steps calibration_file enabled
    adapt expert_partition offload_experts
    """
"""Fields of the "scmoe" section without a flag."""


def _rows(text: str) -> dict[str, str]:
    rows = (line.strip().partition(": ") for line in text.strip().splitlines())
    return {name: answer for name, _, answer in rows}


BY_TOOL = {tool: _rows(text) for tool, text in _BY_TOOL.items()}
"""Tool: name without dashes in front, and the flag here, or a sentence on what serves."""

OTHER_NAMES = {name: answer for rows in BY_TOOL.values() for name, answer in rows.items()}
OTHER_NAMES |= {
    path.rpartition(".")[2].replace("_", "-"): section_flag(dest)
    for dest, path in SECTION_FLAGS.items()
    if dest != path
}
OTHER_NAMES |= {name.replace("_", "-"): f'"{name}" in the JSON\'s "scmoe" section' for name in _NO_FLAG.split()}
"""All of them, and the fields of the "scmoe" section."""
