"""LoRA² on a causal language model: a small Llama that counts up learns to count down.

    python examples/language_model.py

The paper has encoders only. Here a Llama is trained on rows such as 3 4 5 6, modulo 16; its frozen
layers are then adapted to 6 5 4 3. Without the adapters it counts up as before.
"""
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone

from lora2 import RankPruner, add_lora2, orthogonality_loss
from methods.hosts import adapters_off


def rows(n, step):
    """(n, 8) token ids that go on by `step`, from a random start."""
    return (torch.randint(16, (n, 1)) + step * torch.arange(8)) % 16


def next_token(model, ids):
    """(loss, accuracy) of the tokens after the first two, which tell the direction."""
    logits = model(input_ids=ids).logits[:, 1:-1]
    loss = cross_entropy(logits.reshape(-1, 16), ids[:, 2:].reshape(-1))
    accuracy = (logits.argmax(-1) == ids[:, 2:]).float().mean()
    return loss, accuracy.item()


def pretrained():
    """A Llama that counts up, and nothing else."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(60):
        optimizer.zero_grad()
        next_token(model, rows(32, 1))[0].backward()
        optimizer.step()
    return model


def main(T=150):
    """Train, print, and return the model and its pruner."""
    torch.manual_seed(0)
    model = pretrained()
    before = next_token(model, rows(200, -1))[1]
    names = add_lora2(model, "all-linear", k=4, r=4, init="orthonormal")  # but lm_head
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=15, final=50, interval=5)
    for _ in range(T):
        loss, _ = next_token(model, rows(32, -1))
        (loss + 0.1 * orthogonality_loss(model)).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    after = next_token(model, rows(200, -1))[1]
    with adapters_off(model):
        up = next_token(model, rows(200, 1))[1]
    kept = pruner.kept()
    print(f"counts down: {before:.2f} before, {after:.2f} after; up, without adapters: {up:.2f}")
    print(f"kept {sum(kept.values())} of {4 * len(names)}:",
          {name.removeprefix("model.layers."): n for name, n in kept.items() if n > 0})
    return model, pruner, (before, after, up)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait
    main()
