"""A change is planted in one of four layers: which of their 32 singular values does LoRA² keep?

    python examples/planted.py                             # no data, no network, a few seconds

    step     loss  R - floor  kept in layers 0, 2, 4, 6
       1  0.07049    0.00000  [8, 8, 8, 8]
     150  0.00078    0.00045  [0, 0, 5, 0]
     300  0.00001    0.00013  [0, 0, 4, 0]
    exported as a plain LoRA of rank 8: B @ A = ΔW to 6e-17
    merged into plain layers: the same output to 3e-15
"""
import sys

import torch
from torch import nn

sys.path.append(sys.path[0] + "/..")  # to run from a clone

from lora2 import RankPruner, add_lora2, merge_lora2, orthogonality_floor, orthogonality_loss


def main(seed=0, steps=300, gamma=0.1):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                        nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    x = torch.randn(512, 32)
    change = torch.randn(32, 4) @ torch.randn(4, 32) / 32  # of rank 4, for layer 4
    for layer in (net[0], net[2], net[4], net[6]):
        nn.init.normal_(layer.weight, std=0.4)
    net[4].weight.data += change
    target = net(x).detach()
    net[4].weight.data -= change

    add_lora2(net, ["0", "2", "4", "6"], k=8, r=8, alpha=8, init="orthonormal")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0)  # frozen ones stay
    pruner = RankPruner(net, target_rank=1, total_steps=steps, warmup=30, final=90, interval=5)
    print("step     loss  R - floor  kept in layers 0, 2, 4, 6")
    for step in range(1, steps + 1):
        loss = nn.functional.mse_loss(net(x), target)
        R = orthogonality_loss(net)
        (loss + gamma * R).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if step in (1, 150, steps):
            over = R - orthogonality_floor(8, 8)
            print(f"{step:4d}  {loss:.5f}  {over:9.5f}  {list(pruner.kept().values())}")

    y = net(x)
    A, B = net[4].to_lora()
    error = (B @ A - net[4].delta_weight()).abs().max()
    print(f"exported as a plain LoRA of rank {len(A)}: B @ A = ΔW to {error:.0e}")
    error = (merge_lora2(net)(x) - y).abs().max()
    print(f"merged into plain layers: the same output to {error:.0e}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait
    torch.set_default_dtype(torch.float64)  # the path to the end hangs on last bits of float32
    main()
