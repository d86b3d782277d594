"""LoRA² in a loop of accelerate: accumulation, clipping, a state that is saved and loaded.

    python examples/in_accelerate.py
    accelerate launch --cpu --num_processes 2 examples/in_accelerate.py
"""
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone

from lora2 import RankPruner, add_lora2, orthogonality_loss

T, ACCUMULATE = 100, 4  # optimizer steps, and micro-batches in each


def make_model():
    """Three layers with random weights, the first two adapted."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                          nn.Linear(32, 1))
    add_lora2(model, ["0", "2"], k=4, r=4, init="orthonormal", trainable=["4"])
    return model


def main(folder=None):
    """Train, print, and return the model and its pruner."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE, cpu=True)
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=10, final=40, interval=5)
    x = torch.randn(16 * ACCUMULATE * T * accelerator.num_processes, 8)
    data = torch.utils.data.TensorDataset(x, torch.sin(2 * x[:, :1]))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    parallel, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(pruner)

    for x, y in loader:
        with accelerator.accumulate(parallel):
            loss = nn.functional.mse_loss(parallel(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:  # once per optimizer step
                # backward() divides by the number of micro-batches: R counts whole all the same
                accelerator.backward(0.1 * ACCUMULATE * orthogonality_loss(model))
                accelerator.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            if accelerator.sync_gradients:
                pruner.step()
            optimizer.zero_grad()

    accelerator.save_state(folder or tempfile.mkdtemp())  # weights, optimizer, pruner
    accelerator.print(f"loss {loss.item():.3f}, kept {sum(pruner.kept().values())} of 8")
    return model, pruner


if __name__ == "__main__":
    main()
