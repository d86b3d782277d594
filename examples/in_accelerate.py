"""LoRA² in a loop of accelerate: accumulation, clipping, a state that is saved and loaded.

    python examples/in_accelerate.py
    accelerate launch --cpu --num_processes 2 examples/in_accelerate.py

    loss 0.02, kept 2 of 8
"""
import sys

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(sys.path[0] + "/..")  # to run from a clone

from lora2 import RankPruner, add_lora2, orthogonality_loss

T, ACCUMULATE = 100, 4  # optimizer steps, and micro-batches in each

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE, cpu=True)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
add_lora2(model, ["0", "2"], k=4, r=4, init="orthonormal", trainable=["4"])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=10, final=40, interval=5)
x = torch.randn(32 * ACCUMULATE * T * accelerator.num_processes, 8)
loader = DataLoader(TensorDataset(x, torch.sin(2 * x[:, :1])), batch_size=32)
parallel, optimizer, loader = accelerator.prepare(model, optimizer, loader)
accelerator.register_for_checkpointing(pruner)

for x, y in loader:
    with accelerator.accumulate(parallel):
        loss = F.mse_loss(parallel(x), y)
        accelerator.backward(loss)
        if accelerator.sync_gradients:  # once per optimizer step
            # backward() divides by the number of micro-batches: R counts whole all the same
            accelerator.backward(0.1 * ACCUMULATE * orthogonality_loss(model))
            accelerator.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        if accelerator.sync_gradients:
            pruner.step()
        optimizer.zero_grad()

accelerator.save_state("runs/in_accelerate")  # weights, optimizer, pruner: see load_state()
accelerator.print(f"loss {loss:.2f}, kept {sum(pruner.kept().values())} of 8")
