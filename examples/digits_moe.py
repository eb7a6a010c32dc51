"""DeepSpeed's MoE layers in a small image classifier, in the manner of DeepSpeedExamples' CIFAR: `--deepspeed_config`
on the command line, parameter groups and data set handed over, MoE layers in a list of their own.

deepspeed --num_gpus 1 examples/digits_moe.py --deepspeed --deepspeed_config examples/digits_moe.json

One line differs from a DeepSpeed program: `scmoe_ds.initialize` in the place of `deepspeed.initialize`. The layers are
in no block, so the JSON names the tap by its path. Needs scikit-learn for the images.
"""

import argparse

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from sklearn.datasets import load_digits
from torch import nn

import scmoe_ds


class Net(nn.Module):
    def __init__(self, num_experts: list[int]) -> None:
        super().__init__()
        self.stem, self.norm, self.middle = nn.Linear(64, 84), nn.LayerNorm(84), nn.Linear(84, 84)
        self.moe_layer_list = nn.ModuleList(
            [MoE(84, nn.Linear(84, 84), number, k=1, min_capacity=1) for number in num_experts]
        )
        self.head = nn.Linear(84, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(pixels)
        hidden = hidden + torch.relu(self.middle(self.norm(hidden)))
        for moe in self.moe_layer_list:
            hidden = hidden + moe(hidden)[0]
        return self.head(hidden)


def main() -> None:
    """Two passes over the images."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--num-experts", type=int, nargs="+", default=[4, 4])
    args = deepspeed.add_config_arguments(parser).parse_args()
    torch.manual_seed(0)
    net = Net(args.num_experts)
    parameters = {"params": list(net.parameters()), "name": "parameters"}
    images, labels = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    engine, _, loader, _ = scmoe_ds.initialize(
        args=args,
        model=net,
        model_parameters=split_params_into_different_moe_groups_for_optimizer(parameters),
        training_data=data,
    )
    losses: list[float] = []
    for _ in range(2):
        for pixels, label in loader:
            loss = nn.functional.cross_entropy(engine(pixels.to(engine.device)), label.to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            if len(losses) % 30 == 0 and torch.distributed.get_rank() == 0:
                print(f"step {len(losses)}: mean loss of 30 steps {sum(losses[-30:]) / 30:.3f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
