"""Checkpoints: DeepSpeed's own MoE files, checked, durable, and readable by any layout of the same model.

`files` which are whole, `tensor_files` their one loader, `rotation` which can go, `lock` one job per directory;
`saving`, `finite` what is not saved; `loading` which one a run starts from (`directories` what a path stands for,
`failures` which did not train), `comparison` what a resume does about settings that differ and `hyperparameters` the
same in an engine; `saved_state` the files as whole parameters; `reshard` these into an engine; `safetensors_files`
and `convert` weights for others and from others; `parsing` descriptions that others may have written, `paths` the
files that they name; `tokenizer_files`.
"""

from scmoe_ds.checkpoint.comparison import run_settings
from scmoe_ds.checkpoint.description import describe, rebuild
from scmoe_ds.checkpoint.failures import note as note_failure
from scmoe_ds.checkpoint.files import DESCRIPTION_FILE, MANIFEST_FILE
from scmoe_ds.checkpoint.finite import NotFiniteError
from scmoe_ds.checkpoint.loading import Source, choose, load, samples_of_run
from scmoe_ds.checkpoint.lock import release
from scmoe_ds.checkpoint.saving import claim, save

__all__ = [
    "DESCRIPTION_FILE",
    "MANIFEST_FILE",
    "NotFiniteError",
    "Source",
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
