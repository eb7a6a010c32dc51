"""Flags of Megatron-DeepSpeed's pretrain_gpt.py that this program refuses, each with what serves instead."""

from __future__ import annotations

_REFUSED = {
    "use --micro-batch-size": "--batch-size",
    "use --lr-warmup-fraction": "--warmup",
    "use --tensor-model-parallel-size": "--model-parallel-size",
    "use --seq-length": "--encoder-seq-length",
    "the model has no such part": """
        --decoder-seq-length --decoder-num-layers --apply-layernorm-1p --embedding-weights-in-fp32
        --fp32-residual-connection""",
    "use --num-layers": "--encoder-num-layers",
    "a head has --hidden-size / --num-attention-heads channels": "--kv-channels",
    "use --num-experts": "--num-experts-switch",
    "use --position-embedding-type learned_absolute or rope": "--no-position-embedding",
    "--norm-placement post is the nearest": "--apply-residual-connection-post-layernorm",
    "the MLP has GELU, or --swiglu": "--openai-gelu --squared-relu",
    "the loss is computed in fp32": "--fp16-lm-cross-entropy",
    "weights are normal, of --init-method-std": "--init-method-xavier-uniform",
    "all replicas start with the same weights": "--data-parallel-random-init",
    "tensor-parallel ranks keep whole sequences; leave it out": "--sequence-parallel",
    'use "zero_optimization": {"stage": 1} of the JSON': "--use-distributed-optimizer",
    "weight decay is constant: optimizer.params.weight_decay of the JSON": "--start-weight-decay --end-weight-decay",
    "the batch size is constant: train_batch_size of the JSON": "--rampup-batch-size",
    "a shortcut may not cross a pipeline stage": """
        --num-layers-per-virtual-pipeline-stage --pipeline-model-parallel-split-rank --enable-zbh1-pipeline
        --enable-zbh1-exact-semantics --overlap-p2p-communication --use-ring-exchange-p2p
        --no-scatter-gather-tensors-in-pipeline --standalone-embedding-stage
        --inference-batch-times-seqlen-threshold""",
    "use scmoe evaluate, or scmoe generate": "--skip-train --inference --ds-inference",
    "a resumed run has the schedule of the JSON": "--use-checkpoint-opt_param-scheduler",
    "--load and --auto-resume take all of a checkpoint, in any layout; to start from weights alone, "
    "--load an export": "--finetune --no-load-optim --no-load-rng --no-load-lr-state",
    "checkpoints are whole; scmoe convert writes weights alone": "--no-save-optim --no-save-rng",
    "name the checkpoint itself: --load DIRECTORY/global_stepN": "--load-tag",
    "cannot hold experts; --load resumes in any layout": "--universal-checkpoint",
    "write the flags of the run that is resumed; a difference is named": "--use-checkpoint-args",
    "the tokenizer decides it": "--vocab-size --vocab-extra-ids",
    "documents are packed one after another, without masks between them": """
        --reset-position-ids --reset-attention-mask --eod-mask-loss""",
    "sequences have one length, --seq-length": "--random-ltd --data-efficiency-curriculum-learning",
    "--train-iters decides how much is read": "--train-data-exact-num-epochs",
    "use --scmoe-trace N, or flops_profiler of the JSON": """
        --profile --profile-name --profile-backward --profile_steps --profile-ranks""",
    "use --recompute-granularity": """
        --partition-activations --contigious-checkpointing --checkpoint-in-cpu --synchronize-each-layer
        --distribute-checkpointed-activations --distribute-saved-activations --split-transformers
        --scattered-embeddings""",
    "is for ZeRO-3, with which experts do not run": """
        --remote-device --use-pin-memory --memory-centric-tiled-linear --tile-factor""",
    "scmoe analyze gradients looks at norms; the log has the gradient norm": """
        --log-params-norm --log-num-zeros-in-grad""",
    "send SIGTERM to a rank, or use --exit-duration-in-mins": "--kill-switch-file",
    "wandb takes it from its own variable WANDB_DIR": "--wandb-save-dir",
    "the model that was is the only teacher: --distill-from": """
        --mos --kd --load-teacher --num-layers-teacher --num-experts-teacher --hidden-size-teacher
        --num-attention-heads-teacher --kd-alpha-ce --kd-beta-ce --kd-temp --reset-iteration""",
    "belongs to models other than the GPT": """
        --retro-workdir --retro-add-retriever --retro-cyclic-train-iters --retro-encoder-layers
        --retro-return-doc-ids --retro-encoder-hidden-dropout --retro-encoder-attention-dropout
        --retro-num-neighbors --retro-num-retrieved-chunks --output-bert-embeddings --bert-embedder-type
        --bert-no-binary-head --retriever-seq-length --mask-prob --short-seq-prob --ict-head-size
        --biencoder-projection-dim --biencoder-shared-query-context-model --ict-load --bert-load
        --titles-data-path --query-in-block-prob --use-one-sent-docs --evidence-data-path
        --retriever-report-topk-accuracies --retriever-score-scaling --block-data-path --embedding-path
        --indexer-batch-size --indexer-log-interval""",
    "use scmoe pretrain-swin for images": """
        --num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction --data-per-class-fraction
        --no-data-sharding --head-lr-mult --vision-pretraining --vision-pretraining-type --vision-backbone-type
        --swin-backbone-type --mask-type --mask-factor --iter-per-epoch --dino-local-img-size
        --dino-local-crops-number --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer
        --dino-norm-last-layer --dino-warmup-teacher-temp --dino-teacher-temp --dino-warmup-teacher-temp-epochs""",
    "one rank holds whole sequences": """
        --force-ds-sequence-parallel --ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-chunk-size
        --ds-sequence-parallel-fpdt-offloading""",
    "sample indices are made from --data-path, --split, --seq-length and --seed": """
        --train-idx-path --train-desc-path --train-doc-idx-path --train-sample-idx-path --train-shuffle-idx-path
        --return-data-index --repeated-dataloader --sample-rate""",
    "copy the data to a local directory and name it in --data-path": "--aml-data-download-path",
    "use --auto-resume, which needs no service": "--adlr-autoresume --adlr-autoresume-interval",
    "checkpoints are written by one writer per rank": """
        --checkpoint-io-buffer-size --checkpoint-data-parallel --aio-intra-op-parallelism
        --checkpoint-writer-decoupled""",
    "a tokenizer never runs code of its directory": "--trust-remote-code",
    "weights are always initialised": "--no-initialization",
    "this is a program, not a library; use scmoe_ds.initialize": "--use-dataset-only --lazy-mpu-init --onnx-safe",
    "use scmoe generate": "--max-tokens-to-oom",
    '"wall_clock_breakdown" of the JSON writes times': "--no-barrier-with-level-1-timing",
    "no layer runs in fp8 or through Transformer Engine": """
        --fp8-e4m3 --fp8-hybrid --no-fp8-wgrad --fp8-margin --fp8-interval --transformer-impl
        --fp8-amax-history-len --fp8-amax-compute-algo""",
}
"""By what to say of them."""

REFUSED = {flag: reason for reason, flags in _REFUSED.items() for flag in flags.split()}
"""Flag: why this program does not have it, and what serves instead."""
