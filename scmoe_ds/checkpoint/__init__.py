"""Checkpoints: DeepSpeed's own MoE files, checked, durable, and readable by any layout of the same model.

Start with `saving` and `loading`. A save also uses `finite` (refuses NaN), `lock` (one job per directory) and
`rotation` (removes old checkpoints). A start also uses `directories` (which checkpoint a path means), `files` (checks
them), `tensor_files` (the one loader of .pt files), `failure_notes` (checkpoints that do not train), `description`
and `comparison` (settings that differ) and `hyperparameters` (puts a run's own settings back). `saved_state` and
`reshard` change the layout. `export` and `safetensors_files` exchange weights with other programs (`places` says where
in their files), `parsing` checks descriptions, and `tokenizer_files` carries the tokenizer.
"""

from scmoe_ds.checkpoint.comparison import run_settings
from scmoe_ds.checkpoint.description import describe, rebuild
from scmoe_ds.checkpoint.failure_notes import note as note_failure
from scmoe_ds.checkpoint.files import DESCRIPTION_FILE, MANIFEST_FILE
from scmoe_ds.checkpoint.finite import NotFiniteError
from scmoe_ds.checkpoint.loading import Candidate, Source, candidate, choose, load, samples_of_run
from scmoe_ds.checkpoint.lock import release
from scmoe_ds.checkpoint.saving import claim, save
from scmoe_ds.deepspeed_version import check  # noqa: F401 (its import checks DeepSpeed)

__all__ = [
    "DESCRIPTION_FILE",
    "MANIFEST_FILE",
    "Candidate",
    "NotFiniteError",
    "Source",
    "candidate",
    "choose",
    "claim",
    "describe",
    "load",
    "note_failure",
    "rebuild",
    "release",
    "run_settings",
    "samples_of_run",
    "save",
]
