"""LoRA² on a causal language model: a small Llama that counts up learns to count down.

    python examples/language_model.py

    counts down: 0.00, then 1.00, kept 14 of 56
    counts up, with the adapters off: 1.00

The paper has encoders only. Here a Llama is trained on rows such as 3 4 5 6, modulo 16; its frozen
layers are then adapted to 6 5 4 3. Without the adapters it counts up as before.
"""
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(sys.path[0] + "/..")  # to run from a clone

from lora2 import RankPruner, add_lora2, orthogonality_loss
from methods.hosts import adapters_off

T = 150


def rows(n, step):
    """(n, 8) token ids that go on by step, 1 or -1, from a random start."""
    return (torch.randint(16, (n, 1)) + step * torch.arange(8)) % 16


def accuracy(model, step):
    ids = rows(200, step)
    guesses = model(input_ids=ids).logits[:, 1:-1].argmax(-1)  # two tokens tell the direction
    return (guesses == ids[:, 2:]).float().mean()


torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, initializer_range=0.1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
for _ in range(T // 2):  # in place of a pretrained model
    ids = rows(32, 1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
before = accuracy(model, -1)

add_lora2(model, "all-linear", k=4, r=4, init="orthonormal")  # but lm_head
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=15, final=50, interval=5)
for _ in range(T):
    ids = rows(32, -1)
    loss = model(input_ids=ids, labels=ids).loss
    (loss + 0.1 * orthogonality_loss(model)).backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()
kept = sum(pruner.kept().values())
print(f"counts down: {before:.2f}, then {accuracy(model, -1):.2f}, kept {kept} of 56")
with adapters_off(model):
    print(f"counts up, with the adapters off: {accuracy(model, 1):.2f}")
