"""LoRA² on an image model: a small ViT that tells stripes apart learns it for noisy negatives.

    python examples/image_model.py

The paper leaves other modalities open. Here a ViT is trained on four directions of stripes, light
on dark; then its frozen layers are adapted to stripes in the other half of the colours, in noise.
"""
import sys
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone

from lora2 import RankPruner, add_lora2, orthogonality_loss


def images(n, shifted):
    """((n, 3, 16, 16), labels (n,)): stripes in four directions; shifted: another look of them."""
    labels = torch.randint(4, (n,))
    angle = labels * torch.pi / 4
    grid = torch.arange(16.0)
    along = (torch.cos(angle)[:, None, None] * grid[:, None]
             + torch.sin(angle)[:, None, None] * grid)
    stripes = torch.sin(along * 1.5 + 6.3 * torch.rand(n, 1, 1))  # (n, 16, 16)
    pixels = stripes[:, None] * torch.tensor([1.0, 0.5, 0.0])[:, None, None]
    if shifted:
        pixels = -pixels.flip(1) + 0.5 * torch.randn(n, 3, 16, 16)
    return pixels, labels


def accuracy(model):
    """Of 400 shifted images."""
    pixels, labels = images(400, True)
    with torch.no_grad():
        guesses = model(pixel_values=pixels).logits.argmax(1)
    return (guesses == labels).float().mean().item()


def pretrained():
    """A ViT that tells the four directions apart."""
    model = ViTForImageClassification(ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_labels=4, initializer_range=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(150):
        pixels, labels = images(32, False)
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
    return model


def main(T=150):
    """Train, print, and return the model, its pruner and the accuracies."""
    torch.manual_seed(0)
    model = pretrained()
    before = accuracy(model)
    names = add_lora2(model, "all-linear", k=4, r=4, init="orthonormal", trainable=["classifier"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=15, final=50, interval=5)
    for _ in range(T):
        pixels, labels = images(32, True)
        loss = model(pixel_values=pixels, labels=labels).loss
        (loss + 0.1 * orthogonality_loss(model)).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    after, kept = accuracy(model), pruner.kept()
    print(f"accuracy {before:.2f} before, {after:.2f} after;",
          f"kept {sum(kept.values())} of {4 * len(names)}")
    return model, pruner, (before, after)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait
    main()
