"""What the ScMoE paper (arXiv 2404.05019 v3) measured, as rows: speed-ups over the standard top-2 MoE.

Tables 1, 2 and 4 have whole steps, figure 8 has pairs of blocks. `fitted` rows are whole steps without a shortcut and
stated shares; the fit reads no others. A share is communication in the MoE's time. Figure 8 says how much faster ScMoE
is than each baseline: the ratio of two of these numbers compares two baselines, and has no shortcut in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["train", "forward"]
Quantity = Literal["speed-up", "pair", "hidden", "share"]


@dataclass(frozen=True)
class Row:
    """One number of the paper.

    Attributes:
        setting: key of `SETTINGS`.
        method, over: what is compared; of a share or a hidden part `method` alone.
        quantity: "speed-up" of a whole step; "pair": of a pair of blocks; "hidden": share of the communication;
            "share": of the communication in the MoE's time.
        value: as printed.
    """

    setting: str
    mode: Mode
    method: str
    quantity: Quantity
    value: float
    over: str = "top-2"

    @property
    def fitted(self) -> bool:
        """Whether the fit may read it: a stated setting, and in it neither a shortcut nor three routed experts."""
        return self.quantity != "pair" and self.method in ("top-1", "top-2", "shared expert")


@dataclass(frozen=True)
class Setting:
    """A model on a cluster.

    Attributes:
        cluster: file of `clusters/`, without its ending.
        group: settings that one fit serves: the same GPUs and links.
        config: file of `ds_configs/` that has batch sizes and the "scmoe" section.
        preset: of the model's sizes.
        capacity: what the paper's capacity factor multiplies: the mean rows of an expert, as Tutel and DeepSpeed count
            them, or tokens / experts, however many experts a token is routed to, as fairseq does.
        fused_attention: False: scores go through the memory (`unfused.py`).
        micro_batch: sequences or images per GPU and pass; None: as the config has it. Sequences are not accumulated: an
            iteration is a pass. Images are, up to the paper's batch.
        words: for the page.
    """

    words: str
    cluster: str
    group: str
    config: str
    preset: str
    capacity: Literal["rows", "tokens"] = "rows"
    fused_attention: bool = True
    micro_batch: int | None = None


SETTINGS = {
    "swin": Setting("SwinV2-MoE-S, 8×A30-PCIe", "8xA30-pcie", "8×A30", "swinv2_moe_s_8xA30", "swinv2-moe-s"),
    "gpt2": Setting("GPT2-MoE-Medium, 8×A800", "8xA800-nvlink", "8×A800", "gpt2_moe_medium_8xA800", "gpt2-moe-medium"),
    "llama2": Setting("LLaMA2-MoE, 8×A800", "8xA800-nvlink", "8×A800", "llama2_moe_8xA800", "llama2-moe"),
    "gpt3": Setting("GPT3-MoE-XL, 8×A800", "8xA800-nvlink", "8×A800", "gpt3_moe_xl_8xA800", "gpt3-moe-xl"),
    "two nodes": Setting(
        "GPT2-MoE-Medium, 16×A800 in 2 nodes",
        "2x8xA800-4x200g",
        "16×A800",
        "gpt2_moe_medium_16xA800",
        "gpt2-moe-medium",
    ),
}


def _both(setting: str, method: str, train: float, forward: float) -> tuple[Row, Row]:
    return Row(setting, "train", method, "speed-up", train), Row(setting, "forward", method, "speed-up", forward)


ROWS: tuple[Row, ...] = (
    Row("swin", "train", "top-2", "share", 0.60),
    *_both("swin", "top-1", 1.27, 1.39),
    *_both("swin", "shared expert", 1.24, 1.35),
    *_both("swin", "ScMoE Pos-1", 1.36, 1.54),
    *_both("swin", "ScMoE Pos-2", 1.43, 1.66),
    *_both("swin", "ScMoE Pos-3", 1.49, 1.82),
    Row("gpt2", "train", "top-2", "share", 0.15),
    *_both("gpt2", "shared expert", 1.04, 1.06),
    *_both("gpt2", "ScMoE Pos-2", 1.12, 1.17),
    Row("llama2", "train", "top-2", "share", 0.15),
    *_both("llama2", "shared expert", 1.06, 1.11),
    *_both("llama2", "ScMoE Pos-1", 1.14, 1.21),
    *_both("gpt3", "ScMoE Pos-2", 1.12, 1.18),
    *_both("gpt3", "top-3", 0.94, 0.92),
    *_both("gpt3", "ScMoE-2 Pos-2", 1.05, 1.08),
    Row("swin", "forward", "ScMoE Pos-2", "hidden", 0.70),
    Row("swin", "forward", "ScMoE Pos-2", "pair", 1.27, over="shared expert"),
    Row("swin", "forward", "ScMoE Pos-2", "pair", 1.42, over="top-2, pipelined"),
    Row("swin", "forward", "ScMoE Pos-2", "pair", 1.15, over="top-1, pipelined"),
    Row("swin", "forward", "shared expert", "pair", 1.42 / 1.27, over="top-2, pipelined"),
    Row("swin", "forward", "shared expert", "pair", 1.15 / 1.27, over="top-1, pipelined"),
    Row("two nodes", "train", "top-2", "share", 0.50),
    Row("two nodes", "forward", "shared expert", "pair", 1.43 / 1.24, over="top-2, pipelined"),
    Row("two nodes", "forward", "ScMoE Pos-2", "hidden", 1.00),
    Row("two nodes", "forward", "ScMoE Pos-2", "pair", 1.24, over="shared expert"),
    Row("two nodes", "forward", "ScMoE Pos-2", "pair", 1.43, over="top-2, pipelined"),
)
