"""LoRA² on a base in 4 bits, as in QLoRA: train there, merge into the full-precision base.

    python examples/quantised.py                           # bitsandbytes runs on a CPU, too

    error in 4 bits 0.09, merged in full precision 0.08, kept 2 of 8

Layers of bitsandbytes in 4 or 8 bits and weights of torchao in nn.Linear are bases like others. The
file cannot tell such a base from another (its sample is NaN), and nothing is merged into few bits.
On a CPU evaluate after training, not in between: bitsandbytes 0.50 packs 4-bit weights anew in
eval(), and they pass on no gradient then. The pruner says so: "has no gradient".
"""
import copy
import sys

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from torch import nn

sys.path.append(sys.path[0] + "/..")  # to run from a clone

from lora2 import (RankPruner, add_lora2, load_lora2_state_dict, lora2_state_dict, merge_lora2,
                   orthogonality_loss)

T = 200


def in_4_bits(linear):
    """A copy of it, as BitsAndBytesConfig makes it for transformers."""
    layer = Linear4bit(linear.in_features, linear.out_features, quant_type="nf4",
                       compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # which packs the weights


torch.manual_seed(0)
full = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
head = copy.deepcopy(full[4])
model = nn.Sequential(in_4_bits(full[0]), nn.Tanh(), in_4_bits(full[2]), nn.Tanh(), head)
add_lora2(model, ["0", "2"], k=4, r=4, init="orthonormal", trainable=["4"])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=20, final=80, interval=5)
for _ in range(T):
    x = torch.randn(64, 64)
    loss = F.mse_loss(model(x), torch.sin(2 * x[:, :1]))
    (loss + 0.1 * orthogonality_loss(model)).backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()

add_lora2(full, ["0", "2"], k=4, r=4, trainable=["4"])
load_lora2_state_dict(full, lora2_state_dict(model))  # the same adapters on the exact weights
merge_lora2(full)
x = torch.randn(1000, 64)
ours, merged = (F.mse_loss(net(x), torch.sin(2 * x[:, :1])) for net in (model, full))
print(f"error in 4 bits {ours:.2f}, merged in full precision {merged:.2f},",
      f"kept {sum(pruner.kept().values())} of 8")
