"""Flags of Megatron-DeepSpeed's pretrain_gpt.py that this program refuses, each with what serves instead."""

from __future__ import annotations

_ZERO3 = "is for ZeRO-3, with which experts do not run"
_NO_SUCH_MODEL = "the model has no such part"
_TEACHER = "there is no distillation"
_EVALUATE = "use scmoe evaluate, or scmoe generate"
_RESUME = (
    "--load and --auto-resume take all of a checkpoint, in any layout; to start from weights alone, --load an export"
)
_CURRICULUM = "sequences have one length, --seq-length"

REFUSED: dict[str, str] = {
    "--batch-size": "use --micro-batch-size",
    "--warmup": "use --lr-warmup-fraction",
    "--model-parallel-size": "use --tensor-model-parallel-size",
    "--encoder-seq-length": "use --seq-length",
    "--decoder-seq-length": _NO_SUCH_MODEL,
    "--encoder-num-layers": "use --num-layers",
    "--decoder-num-layers": _NO_SUCH_MODEL,
    "--kv-channels": "a head has --hidden-size / --num-attention-heads channels",
    "--num-experts-switch": "use --num-experts",
    "--no-position-embedding": "use --position-embedding-type learned_absolute or rope",
    "--apply-layernorm-1p": _NO_SUCH_MODEL,
    "--apply-residual-connection-post-layernorm": "--norm-placement post is the nearest",
    "--openai-gelu": "the MLP has GELU, or --swiglu",
    "--squared-relu": "the MLP has GELU, or --swiglu",
    "--embedding-weights-in-fp32": _NO_SUCH_MODEL,
    "--fp32-residual-connection": _NO_SUCH_MODEL,
    "--fp16-lm-cross-entropy": "the loss is computed in fp32",
    "--init-method-xavier-uniform": "weights are normal, of --init-method-std",
    "--data-parallel-random-init": "all replicas start with the same weights",
    "--sequence-parallel": "tensor-parallel ranks keep whole sequences; leave it out",
    "--use-distributed-optimizer": 'use "zero_optimization": {"stage": 1} of the JSON',
    "--start-weight-decay": "weight decay is constant: optimizer.params.weight_decay of the JSON",
    "--end-weight-decay": "weight decay is constant: optimizer.params.weight_decay of the JSON",
    "--rampup-batch-size": "the batch size is constant: train_batch_size of the JSON",
    "--num-layers-per-virtual-pipeline-stage": "a shortcut may not cross a pipeline stage",
    "--pipeline-model-parallel-split-rank": "a shortcut may not cross a pipeline stage",
    "--skip-train": _EVALUATE,
    "--inference": _EVALUATE,
    "--ds-inference": _EVALUATE,
    "--use-checkpoint-opt_param-scheduler": "a resumed run has the schedule of the JSON",
    "--finetune": _RESUME,
    "--no-load-optim": _RESUME,
    "--no-load-rng": _RESUME,
    "--no-load-lr-state": _RESUME,
    "--no-save-optim": "checkpoints are whole; scmoe convert writes weights alone",
    "--no-save-rng": "checkpoints are whole; scmoe convert writes weights alone",
    "--load-tag": "name the checkpoint itself: --load DIRECTORY/global_stepN",
    "--universal-checkpoint": "cannot hold experts; --load resumes in any layout",
    "--use-checkpoint-args": "write the flags of the run that is resumed; a difference is named",
    "--vocab-size": "the tokenizer decides it",
    "--vocab-extra-ids": "the tokenizer decides it",
    "--reset-position-ids": "documents are packed one after another, without masks between them",
    "--reset-attention-mask": "documents are packed one after another, without masks between them",
    "--eod-mask-loss": "documents are packed one after another, without masks between them",
    "--random-ltd": _CURRICULUM,
    "--data-efficiency-curriculum-learning": _CURRICULUM,
    "--train-data-exact-num-epochs": "--train-iters decides how much is read",
    "--profile": "use --scmoe-trace N, or flops_profiler of the JSON",
    "--profile-name": "use --scmoe-trace N, or flops_profiler of the JSON",
    "--profile-backward": "use --scmoe-trace N, or flops_profiler of the JSON",
    "--partition-activations": "use --recompute-granularity",
    "--contigious-checkpointing": "use --recompute-granularity",
    "--checkpoint-in-cpu": "use --recompute-granularity",
    "--synchronize-each-layer": "use --recompute-granularity",
    "--distribute-checkpointed-activations": "use --recompute-granularity",
    "--distribute-saved-activations": "use --recompute-granularity",
    "--remote-device": _ZERO3,
    "--use-pin-memory": _ZERO3,
    "--memory-centric-tiled-linear": _ZERO3,
    "--log-params-norm": "scmoe analyze gradients looks at norms; the log has the gradient norm",
    "--log-num-zeros-in-grad": "scmoe analyze gradients looks at norms; the log has the gradient norm",
    "--kill-switch-file": "send SIGTERM to a rank, or use --exit-duration-in-mins",
    "--wandb-save-dir": "wandb takes it from its own variable WANDB_DIR",
    "--mos": _TEACHER,
    "--kd": _TEACHER,
    "--load-teacher": _TEACHER,
    "--num-layers-teacher": _TEACHER,
    "--num-experts-teacher": _TEACHER,
    "--hidden-size-teacher": _TEACHER,
    "--num-attention-heads-teacher": _TEACHER,
}
"""Flags that this program does not have, and what serves instead."""

REFUSED_GROUPS: dict[str, str] = {
    "belongs to models other than the GPT": """
        --retro-workdir --retro-add-retriever --retro-cyclic-train-iters --retro-encoder-layers --retro-return-doc-ids
        --retro-encoder-hidden-dropout --retro-encoder-attention-dropout --retro-num-neighbors
        --retro-num-retrieved-chunks --output-bert-embeddings --bert-embedder-type --bert-no-binary-head
        --retriever-seq-length --mask-prob --short-seq-prob --ict-head-size --biencoder-projection-dim
        --biencoder-shared-query-context-model --ict-load --bert-load --titles-data-path --query-in-block-prob
        --use-one-sent-docs --evidence-data-path --retriever-report-topk-accuracies --retriever-score-scaling
        --block-data-path --embedding-path --indexer-batch-size --indexer-log-interval""",
    "use scmoe pretrain-swin for images": """
        --num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction --data-per-class-fraction
        --no-data-sharding --head-lr-mult --vision-pretraining --vision-pretraining-type --vision-backbone-type
        --swin-backbone-type --mask-type --mask-factor --iter-per-epoch --dino-local-img-size
        --dino-local-crops-number --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer
        --dino-norm-last-layer --dino-warmup-teacher-temp --dino-teacher-temp --dino-warmup-teacher-temp-epochs""",
    _TEACHER: "--kd-alpha-ce --kd-beta-ce --kd-temp --reset-iteration",
    "a shortcut may not cross a pipeline stage": """
        --enable-zbh1-pipeline --enable-zbh1-exact-semantics --overlap-p2p-communication --use-ring-exchange-p2p
        --no-scatter-gather-tensors-in-pipeline --standalone-embedding-stage
        --inference-batch-times-seqlen-threshold""",
    "one rank holds whole sequences": """
        --force-ds-sequence-parallel --ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-chunk-size
        --ds-sequence-parallel-fpdt-offloading""",
    "sample indices are made from --data-path, --split, --seq-length and --seed": """
        --train-idx-path --train-desc-path --train-doc-idx-path --train-sample-idx-path --train-shuffle-idx-path
        --return-data-index --repeated-dataloader --sample-rate""",
    "copy the data to a local directory and name it in --data-path": "--aml-data-download-path",
    "use --auto-resume, which needs no service": "--adlr-autoresume --adlr-autoresume-interval",
    "use --recompute-granularity": "--split-transformers --scattered-embeddings",
    _ZERO3: "--tile-factor",
    "checkpoints are written by one writer per rank": """
        --checkpoint-io-buffer-size --checkpoint-data-parallel --aio-intra-op-parallelism
        --checkpoint-writer-decoupled""",
    "use --scmoe-trace N, or flops_profiler of the JSON": "--profile_steps --profile-ranks",
    "a tokenizer never runs code of its directory": "--trust-remote-code",
    "weights are always initialised": "--no-initialization",
    "this is a program, not a library; use scmoe_ds.initialize": "--use-dataset-only --lazy-mpu-init --onnx-safe",
    "use scmoe generate": "--max-tokens-to-oom",
    '"wall_clock_breakdown" of the JSON writes times': "--no-barrier-with-level-1-timing",
    "no layer runs in fp8 or through Transformer Engine": """
        --fp8-e4m3 --fp8-hybrid --no-fp8-wgrad --fp8-margin --fp8-interval --transformer-impl --fp8-amax-history-len
        --fp8-amax-compute-algo""",
}
"""Further ones, by what to say of them."""

REFUSED |= {flag: reason for reason, flags in REFUSED_GROUPS.items() for flag in flags.split()}
