"""The training loop for image classifiers: counts images instead of tokens, and validates accuracy."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.models.swin import IGNORED, SwinOutput
from scmoe_ds.parallel.process import device
from scmoe_ds.training.log import TrainingLog
from scmoe_ds.training.loop import Trainer


class ImageLog(TrainingLog):
    """As for text, with `accuracy`, the share of images that the last validation classified correctly."""

    loss_name, unit = "class_loss", "images"
    accuracy: float | None = None

    def write_validation(
        self, iteration: int, consumed_samples: int, loss: float, teachers: float | None = None
    ) -> None:
        """Writes the result of a validation; loss in nats per image. A Swin has no source."""
        assert self.accuracy is not None
        self._validation(iteration, consumed_samples, {"accuracy": self.accuracy}, loss)


class ImageTrainer(Trainer):
    """A `Trainer` whose data sets yield {"images", "labels"} and whose engine's module is a SwinMoE.

    `settings.seq_length` is 1, so that tokens per second are images per second. Validation reads the whole set.
    """

    log_class = ImageLog
    log: ImageLog

    def evaluate(self, data: Any) -> float | None:
        """Mean loss in nats over all images whose label is not `IGNORED`; sets the log's accuracy.

        None if the ranks were told to stop meanwhile. Collective.
        """
        self.engine.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=device())  # loss, hits, images
        with torch.no_grad():
            for batch in self._until_stopped(self._batches(data, 0)):
                output, labels = self._forward(batch), batch["labels"].to(device(), non_blocking=True)
                assert output.class_loss is not None
                count = (labels != IGNORED).sum()
                hits = (output.logits.argmax(-1) == labels).sum()
                sums += torch.stack([output.class_loss.double() * count, hits.double(), count.double()])
        self.engine.train()
        if self._told_to_stop:
            return None
        dist.all_reduce(sums)
        loss, hits, images = sums.tolist()
        self.log.accuracy = hits / images
        return loss / images

    def _forward(self, batch: dict[str, Tensor], samples: range | None = None) -> SwinOutput:
        on_device = {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}
        output: SwinOutput = self.engine(on_device["images"], labels=on_device["labels"])
        return output
