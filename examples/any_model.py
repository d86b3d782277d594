"""LoRA² in a plain loop on any model: accumulation, bf16, clipping, averaged weights, a file.

    python examples/any_model.py                           # needs torch only
"""
import sys
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone

from lora2 import (RankPruner, add_lora2, load_lora2_state_dict, lora2_layers, lora2_state_dict,
                   orthogonality_loss)
from methods.hosts import adapters_off

T, ACCUMULATE = 120, 2  # optimizer steps, and micro-batches in each


def make_model():
    """Three layers with random weights, always the same, in place of a pretrained model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                          nn.Linear(32, 1))
    add_lora2(model, ["0", "2"], k=4, r=4, init="orthonormal", trainable=["4"])
    return model


def main():
    """Train, print, and return the model, the averaged one and the pruner."""
    model = make_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=12, final=48, interval=5)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(T):
        for part in range(ACCUMULATE):
            x = torch.randn(32, 8)
            with torch.autocast("cpu", torch.bfloat16):
                y = model(x)
            loss = nn.functional.mse_loss(y.float(), torch.sin(2 * x[:, :1]))
            (loss / ACCUMULATE).backward()
        (0.1 * orthogonality_loss(model)).backward()  # once, not per micro-batch
        nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    pruner.mask(averaged)  # an average of pruned weights is not pruned

    x = torch.randn(1000, 8)
    target = torch.sin(2 * x[:, :1])
    error = nn.functional.mse_loss(model(x), target).item()
    with adapters_off(model):  # the head stays as it was trained
        without = nn.functional.mse_loss(model(x), target).item()
    count = sum(int(layer.lam.count_nonzero()) for _, layer in lora2_layers(averaged))
    print(f"error {error:.2f}, without adapters {without:.2f}, averaged: {count} of 8 left")

    fresh = make_model()
    load_lora2_state_dict(fresh, lora2_state_dict(averaged.module))
    print("loaded:", torch.equal(fresh(x), averaged(x)))
    return model, averaged, pruner


if __name__ == "__main__":
    main()
