"""LoRA² in the Trainer of transformers: accumulation, bf16, checkpoints, the best model at the end.

    python examples/in_trainer.py
    torchrun --nproc_per_node=2 examples/in_trainer.py     # two processes: R still counts once

    loss 0.10, kept 13 of 52

A checkpoint of an adapted model is none for from_pretrained(), which would fill renamed matrices at
random, with a warning only. What leaves the run is lora2_state_dict(), or the merged model.
"""
import sys

import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.append(sys.path[0] + "/..")  # to run from a clone

from lora2 import RankPruner, add_lora2, orthogonality_loss

T, FINAL = 60, 24  # optimizer steps, and the last of them in which the choice is fixed


class LoRA2Trainer(Trainer):
    def training_step(self, *args, **kwargs):  # in compute_loss(), R would count per micro-batch
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # the last micro-batch of a step
            self.accelerator.backward(0.1 * orthogonality_loss(self.model))
        return loss


class Pruning(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.pruner.step()

    def on_train_end(self, args, state, control, model, **kwargs):
        model.pruner.mask(model)  # the model that is kept; warns if the run ended early


torch.manual_seed(0)
model = BertForSequenceClassification(BertConfig(
    vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, initializer_range=0.1))
names = add_lora2(model, "all-linear", k=4, r=4, init="orthonormal", trainable=["classifier"])
# As a part of the model it is in Trainer's checkpoints, too.
model.pruner = RankPruner(model, 1, total_steps=T, warmup=6, final=FINAL, interval=5)
rows = []  # of eight tokens: is the first below ten?
for ids in torch.randint(20, (2200, 8)):
    rows.append({"input_ids": ids, "labels": int(ids[0] < 10)})
arguments = TrainingArguments(
    "runs/in_trainer", max_steps=T, learning_rate=0.01, bf16=True, use_cpu=True,
    per_device_train_batch_size=16, gradient_accumulation_steps=2, max_grad_norm=10.0,
    eval_strategy="steps", save_strategy="steps", eval_steps=12, save_steps=12,
    load_best_model_at_end=True, eval_delay=T - FINAL)  # before, models have more Λ
trainer = LoRA2Trainer(model, arguments, train_dataset=rows[200:], eval_dataset=rows[:200],
                       callbacks=[Pruning()])
trainer.train()
kept = sum(model.pruner.kept().values())
print(f"loss {trainer.state.best_metric:.2f}, kept {kept} of {4 * len(names)}")
