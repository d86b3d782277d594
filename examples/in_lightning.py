"""LoRA² in a LightningModule: accumulation, clipping, checkpoints.

    python examples/in_lightning.py

The pruner is a part of the module, so that Lightning saves and loads its state by itself.
"""
import sys
import tempfile
from pathlib import Path

import lightning
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone

from lora2 import RankPruner, add_lora2, orthogonality_loss

T, ACCUMULATE = 100, 2  # optimizer steps, and micro-batches in each


class Regression(lightning.LightningModule):
    """Three layers with random weights, the first two adapted."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                                 nn.Linear(32, 1))
        add_lora2(self.net, ["0", "2"], k=4, r=4, init="orthonormal", trainable=["4"])
        self.pruner = RankPruner(self.net, target_rank=1, total_steps=T, warmup=10, final=40,
                                 interval=5)

    def training_step(self, batch, batch_index):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer):  # once per optimizer step, before clipping
        (0.1 * orthogonality_loss(self.net)).backward()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        self.pruner.step()  # gradients are there until the next closure

    def on_train_end(self):
        self.pruner.mask(self.net)  # warns if the run ended early

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def main(folder=None, checkpoint=None, steps=T):
    """Train, print, and return the module and the trainer. checkpoint: of a run to go on with."""
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(16 * ACCUMULATE * T, 8)
    data = torch.utils.data.TensorDataset(x, torch.sin(2 * x[:, :1]))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    trainer = lightning.Trainer(
        max_steps=steps, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=10.0,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder or tempfile.mkdtemp())
    module = Regression()
    trainer.fit(module, loader, ckpt_path=checkpoint)
    loss = trainer.callback_metrics["loss"].item()
    print(f"loss {loss:.3f}, kept {sum(module.pruner.kept().values())} of 8")
    return module, trainer


if __name__ == "__main__":
    main()
