"""LoRA² in a LightningModule: accumulation, clipping, checkpoints.

    python examples/in_lightning.py
    torchrun --nproc_per_node=2 examples/in_lightning.py   # two processes: R still counts once

    loss 0.05, kept 2 of 8
"""
import os
import sys

import lightning
import torch
from torch import nn

sys.path.append(sys.path[0] + "/..")  # to run from a clone

from lora2 import RankPruner, add_lora2, orthogonality_loss

T, ACCUMULATE = 100, 2  # optimizer steps, and micro-batches in each


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                                 nn.Linear(32, 1))
        add_lora2(self.net, ["0", "2"], k=4, r=4, init="orthonormal", trainable=["4"])
        # As a part of the module it is in Lightning's checkpoints, too.
        self.pruner = RankPruner(self.net, 1, total_steps=T, warmup=10, final=40, interval=5)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)

    def training_step(self, x):
        loss = nn.functional.mse_loss(self.net(x), torch.sin(2 * x[:, :1]))
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer):  # once per optimizer step, before clipping
        (0.1 * orthogonality_loss(self.net)).backward()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        self.pruner.step()  # gradients are there until the next closure

    def on_train_end(self):
        self.pruner.mask(self.net)  # warns if the run ended early


torch.manual_seed(0)
module = Regression()
loader = torch.utils.data.DataLoader(torch.randn(16 * ACCUMULATE * T, 8), batch_size=16)
trainer = lightning.Trainer(
    accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", 1)), max_steps=T,
    accumulate_grad_batches=ACCUMULATE, gradient_clip_val=10.0, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(module, loader)
kept = sum(module.pruner.kept().values())
module.print(f"loss {trainer.callback_metrics['loss']:.2f}, kept {kept} of 8")
