"""LoRA² on a base in 4 bits, as in QLoRA: train there, merge into the full-precision base.

    python examples/quantised.py                           # bitsandbytes runs on a CPU, too

Layers of bitsandbytes in 4 or 8 bits and weights of torchao in nn.Linear are bases like others. The
file cannot tell such a base from another (its sample is NaN), and nothing is merged into few bits.
On a CPU evaluate after training, not in between: bitsandbytes 0.50 packs 4-bit weights anew in
eval(), and they pass on no gradient then. The pruner says so: "has no gradient".
"""
import copy
import sys
from pathlib import Path

import bitsandbytes
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone

from lora2 import (RankPruner, add_lora2, load_lora2_state_dict, lora2_state_dict, merge_lora2,
                   orthogonality_loss)


def in_4_bits(model):
    """A copy with its inner layers in 4 bits, as BitsAndBytesConfig does it for transformers."""
    model = copy.deepcopy(model)
    for i in (0, 2):
        full = model[i]
        layer = bitsandbytes.nn.Linear4bit(full.in_features, full.out_features, quant_type="nf4",
                                           compute_dtype=torch.float32)
        layer.load_state_dict(full.state_dict())
        model[i] = layer.to("cpu")  # which packs the weights
    return model


def main(T=200):
    """Train, print, and return the quantised model, the pruner and the merged model."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                         nn.Linear(64, 1))
    model = in_4_bits(base)
    names = add_lora2(model, ["0", "2"], k=4, r=4, init="orthonormal", trainable=["4"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=20, final=80, interval=5)
    for _ in range(T):
        x = torch.randn(64, 64)
        loss = nn.functional.mse_loss(model(x), torch.sin(2 * x[:, :1]))
        (loss + 0.1 * orthogonality_loss(model)).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()

    full = copy.deepcopy(base)
    add_lora2(full, names, k=4, r=4, trainable=["4"])
    load_lora2_state_dict(full, lora2_state_dict(model))  # the same adapters on the exact weights
    merged = merge_lora2(full)
    x = torch.randn(1000, 64)
    target = torch.sin(2 * x[:, :1])
    errors = [nn.functional.mse_loss(net(x), target).item() for net in (model, merged)]
    print("error in 4 bits {:.3f}, merged in full precision {:.3f};".format(*errors),
          f"kept {sum(pruner.kept().values())} of 8")
    return model, pruner, merged


if __name__ == "__main__":
    main()
