"""LoRA² in a plain loop on any model: accumulation, bf16, clipping, averaged weights, a file.

    python examples/any_model.py                           # needs torch only

    error 0.07, with the adapters off 0.49
    averaged weights: kept 2 of 8, loaded: True

Averaged weights are not pruned, even if all that went into them are, nor are schedule-free ones
after optimizer.eval(): pruner.mask(model) puts the last choice on them.
"""
import copy
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.append(sys.path[0] + "/..")  # to run from a clone

from lora2 import RankPruner, add_lora2, lora2_state_dict, orthogonality_loss
from methods.hosts import adapters_off, rebuild

T, ACCUMULATE = 120, 2  # optimizer steps, and micro-batches in each

torch.manual_seed(0)
# Random weights, in place of a pretrained model.
base = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
model = copy.deepcopy(base)
add_lora2(model, ["0", "2"], k=4, r=4, init="orthonormal", trainable=["4"])
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=0.02)
pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=12, final=48, interval=5)
averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
for _ in range(T):
    for x in torch.randn(ACCUMULATE, 32, 8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(model(x), torch.sin(2 * x[:, :1]))
        (loss / ACCUMULATE).backward()
    (0.1 * orthogonality_loss(model)).backward()  # once, not per micro-batch
    nn.utils.clip_grad_norm_(trained, 10.0)
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()
    averaged.update_parameters(model)
pruner.mask(averaged)

x = torch.randn(1000, 8)
error = F.mse_loss(model(x), torch.sin(2 * x[:, :1]))
with adapters_off(model):  # the head stays as it was trained
    without = F.mse_loss(model(x), torch.sin(2 * x[:, :1]))
print(f"error {error:.2f}, with the adapters off {without:.2f}")
state = lora2_state_dict(averaged.module)  # for torch.save()
kept = state["0.lam"].count_nonzero() + state["2.lam"].count_nonzero()
rebuild(base, state)
same = torch.equal(base(x), averaged(x))
print(f"averaged weights: kept {kept} of 8, loaded: {same}")
