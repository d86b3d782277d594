"""LoRA² in the Trainer of transformers: accumulation, bf16, checkpoints, the best model at the end.

    python examples/in_trainer.py
    torchrun --nproc_per_node=2 examples/in_trainer.py     # two processes: R still counts once

The pruner is a part of the model, so that Trainer saves, resumes and reloads its state by itself. A
checkpoint of the adapted model is none for from_pretrained(): that would fill the renamed matrices
at random, with a warning only. What leaves the run is lora2_state_dict(), or the merged model.
"""
import sys
import tempfile
from pathlib import Path

import torch
from transformers import (BertConfig, BertForSequenceClassification, Trainer, TrainerCallback,
                          TrainingArguments)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone

from lora2 import RankPruner, add_lora2, orthogonality_loss

T, FINAL = 60, 24  # optimizer steps, and the last of them in which the choice is fixed


class LoRA2Trainer(Trainer):
    """Trainer with 0.1 · R in the loss, once per optimizer step."""

    def training_step(self, *args, **kwargs):  # in compute_loss(), R would count per micro-batch
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # the last micro-batch of a step
            self.accelerator.backward(0.1 * orthogonality_loss(self.model))
        return loss


class Pruning(TrainerCallback):
    """Steps the pruner, and prunes the model that is kept."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.pruner.step()

    def on_train_end(self, args, state, control, model, **kwargs):
        model.pruner.mask(model)  # warns if the run ended early


def make_model():
    """A small BERT with random weights, adapters, and the pruner as a part of it."""
    model = BertForSequenceClassification(BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    add_lora2(model, ["query", "key", "value"], k=4, r=4, init="orthonormal",
              trainable=["pooler", "classifier"])
    model.pruner = RankPruner(model, target_rank=1, total_steps=T, warmup=6, final=FINAL,
                              interval=5)
    return model


def rows(n):
    """Eight tokens each: is the first below ten?"""
    ids = torch.randint(20, (n, 8))
    return [{"input_ids": row, "labels": int(row[0] < 10)} for row in ids]


def main(folder=None, resume=None, callbacks=()):
    """Train, print, and return the trainer."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        folder or tempfile.mkdtemp(), max_steps=T, learning_rate=0.02, weight_decay=0.0,
        per_device_train_batch_size=16, gradient_accumulation_steps=2, max_grad_norm=10.0,
        bf16=True, use_cpu=True, eval_strategy="steps", save_strategy="steps", eval_steps=12,
        save_steps=12, load_best_model_at_end=True, report_to=[], disable_tqdm=True,
        eval_delay=T - FINAL)  # the best of the pruned ones: earlier models have more Λ
    trainer = LoRA2Trainer(make_model(), arguments, train_dataset=rows(2000),
                           eval_dataset=rows(200), callbacks=[Pruning(), *callbacks])
    trainer.train(resume_from_checkpoint=resume)
    kept = trainer.model.pruner.kept()
    print(f"loss {trainer.evaluate()['eval_loss']:.3f}, kept {sum(kept.values())} of 24")
    return trainer


if __name__ == "__main__":
    main()
