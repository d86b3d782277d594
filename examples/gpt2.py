"""LoRA² on GPT-2, whose Conv1D layers are first made nn.Linear; then rebuilt from its file alone.

    python examples/gpt2.py

    Conv1D made nn.Linear: the same logits to 0e+00
    loss 2.81 → 2.35, kept 8 of 32
    rebuilt from the file alone: True
"""
import copy
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.append(sys.path[0] + "/..")  # to run from a clone

from lora2 import RankPruner, add_lora2, lora2_state_dict, orthogonality_loss
from methods.hosts import conv1d_to_linear, rebuild

T = 40

torch.manual_seed(0)
base = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=32, n_layer=2, n_head=2,
                                  bos_token_id=0, eos_token_id=0)).eval()
ids = torch.randint(16, (8, 9))
model = conv1d_to_linear(copy.deepcopy(base))
change = (model(ids).logits - base(ids).logits).abs().max()
print(f"Conv1D made nn.Linear: the same logits to {change:.0e}")

names = add_lora2(model, "all-linear", k=2, r=4, init="orthonormal", trainable=["ln_f"])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=5, final=15, interval=5)
first = model(ids, labels=ids).loss
for _ in range(T):
    loss = model(ids, labels=ids).loss  # eight rows by heart
    (loss + 0.1 * orthogonality_loss(model)).backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()
kept = sum(pruner.kept().values())
print(f"loss {first:.2f} → {loss:.2f}, kept {kept} of {4 * len(names)}")

again = conv1d_to_linear(copy.deepcopy(base))
rebuild(again, lora2_state_dict(model))  # no names, no k, no r, no alpha
print("rebuilt from the file alone:", torch.equal(again(ids).logits, model(ids).logits))
