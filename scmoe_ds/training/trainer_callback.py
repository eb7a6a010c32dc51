"""`ScMoECallback`: Hugging Face's Trainer with everything that the "scmoe" section of its DeepSpeed JSON says.

A callback is told what Trainer does, but has no part in how the engine is made and in what is saved. So this one puts
`scmoe_ds.initialize` in the place of `deepspeed.initialize` while Trainer makes its engine, and adds to `save_model`.
A callback, not a Trainer of its own, because it works with every subclass too: TRL's, or a framework's.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from scmoe_ds.checkpoint.autoep.saving import save_pretrained
from scmoe_ds.checkpoint.safetensors_files import INDEX_FILE
from scmoe_ds.engine.client_optimizer import follow_groups
from scmoe_ds.engine.take_over import engine_of, take_over
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.parallel.agreement import run_on_rank_zero


class ScMoECallback(TrainerCallback, ExportableState):
    """Hand one to `Trainer(callbacks=[scmoe_ds.ScMoECallback()])`, with a "scmoe" section in its DeepSpeed JSON.

    Layers are replaced (`"replace": true`) or put under a schedule (AutoEP's), experts get parameter groups of their
    own, and the first micro-batches are timed for the schedules; a resumed run takes the checkpoint's times. The loss
    of a model of `moe_from_dense` has its balancing loss in it, times `aux_loss_coefficient`. What Trainer saves as
    `model.safetensors` has the experts of all ranks.

    Example:
        ```python
        arguments = transformers.TrainingArguments(output, deepspeed="ds.json", …)
        trainer = transformers.Trainer(model, arguments, callbacks=[scmoe_ds.ScMoECallback()], …)
        trainer.train()
        ```
    """

    def __init__(self) -> None:
        self._overlap: Any = None

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps: the measured times."""
        return {"args": {}, "attributes": {"times": None if self._overlap is None else self._overlap.state()}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on, Trainer's next engine is made by `scmoe_ds.initialize`."""
        _save_all_experts()
        take_over(True)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        """
        Raises:
            ScMoEConfigError: Trainer has made no engine with a section.
        """
        take_over(False)
        engine = None if model is None else engine_of(model)
        if engine is None:
            raise ScMoEConfigError(
                'ScMoECallback: Trainer has made no engine with a "scmoe" section; hand the callback to '
                "Trainer(callbacks=[…]), and give TrainingArguments(deepspeed=…) a JSON with that section"
            )
        follow_groups(lr_scheduler)
        self._overlap = engine.overlap
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._overlap.resume((kept[-1] if isinstance(kept, list) else kept).get("attributes", {}).get("times"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Another `train()` makes another engine."""
        take_over(True)


def _save_all_experts() -> None:
    """Lets `Trainer.save_model` write the experts of all ranks, where an engine is ours. Trainer's own code takes a
    rank's state dict for the whole model."""
    if hasattr(Trainer.save_model, "saves_all_experts"):
        return
    original = Trainer.save_model

    @functools.wraps(original)
    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        engine = engine_of(self.model)
        if engine is None:
            return original(self, output_dir, _internal_call)
        original(self, output_dir, _internal_call=True)  # which pushes nothing to a hub yet
        _write_weights(engine, Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=getattr(self.args, "hub_revision", None))
        return None

    save_model.saves_all_experts = True  # type: ignore[attr-defined]
    Trainer.save_model = save_model


def _write_weights(engine: Any, out: Path) -> None:
    """Puts the weights of all ranks in the place of those that Trainer has written. Collective."""
    beside = out / "all_experts"
    # Of a run that was stopped here. All ranks wait, because rank 0 has made the directory.
    run_on_rank_zero(lambda: shutil.rmtree(beside, ignore_errors=True))
    save_pretrained(engine, beside)

    def move() -> None:
        for old in (*out.glob("model*.safetensors"), out / INDEX_FILE):
            old.unlink(missing_ok=True)
        for new in beside.iterdir():
            new.replace(out / new.name)
        beside.rmdir()

    run_on_rank_zero(move)
