"""A change is planted in one of four layers: which of their 32 singular values does LoRA² keep?

    python examples/planted.py                             # no data, no network, a few seconds

It prints the loss, the distance of R from its least value and what is kept, as training goes on,
and at the end how exactly the result is exported and merged.
"""
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone

from lora2 import RankPruner, add_lora2, merge_lora2, orthogonality_floor, orthogonality_loss


def make_problem(planted_in=2):
    """(four frozen layers with tanh between them, x (512, 32), their output after the change)."""
    layers = [nn.Linear(32, 32) for _ in range(4)]
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], nn.Tanh(), layers[3])
    x = torch.randn(512, 32)
    change = torch.randn(32, 4) @ torch.randn(4, 32) / 32  # of rank 4
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.4)
    weight = layers[planted_in].weight.data
    weight += change
    target = net(x).detach()
    weight -= change
    return net, x, target


def main(seed=0, steps=300, gamma=0.1):
    """Train on the problem and print the table."""
    torch.manual_seed(seed)
    net, x, target = make_problem()
    add_lora2(net, ["0", "2", "4", "6"], k=8, r=8, alpha=8, init="orthonormal")
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0)
    pruner = RankPruner(net, target_rank=1, total_steps=steps, warmup=30, final=90, interval=5)
    floor = orthogonality_floor(8, 8)

    print("planted: a change of rank 4 in layer 4")
    print("step     loss  R - floor  kept in layers 0, 2, 4, 6")
    for step in range(1, steps + 1):
        loss = nn.functional.mse_loss(net(x), target)
        R = orthogonality_loss(net)
        (loss + gamma * R).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if step in (1, 30, 60, 90, 150, 210, steps):
            print(f"{step:4d}  {loss:.5f}  {R - floor:9.5f}  {list(pruner.kept().values())}")

    y = net(x)
    A, B = net[4].to_lora()
    error = (B @ A - net[4].delta_weight()).abs().max()
    print(f"exported as a plain LoRA of rank {len(A)}: B @ A = ΔW to {error:.0e}")
    error = (merge_lora2(net)(x) - y).abs().max()
    print(f"merged into plain layers: the same output to {error:.0e}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait
    main()
