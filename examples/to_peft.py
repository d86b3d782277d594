"""LoRA² handed out as a plain LoRA of rank k, which is exact: peft opens, serves and merges it.

    python examples/to_peft.py
"""
import copy
import sys
import tempfile
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone

from lora2 import add_lora2, lora2_layers

HEAD = ["lm_head"]


def export_peft(model, base, folder, trained=()):
    """Write the adapters of `model` for peft, and what else was trained. base: without adapters."""
    layers = lora2_layers(model)
    k = layers[0][1].k
    theirs = peft.get_peft_model(base, peft.LoraConfig(
        r=k, lora_alpha=k, target_modules=[name for name, _ in layers],
        modules_to_save=list(trained) or None))
    state = {}
    for name, parameter in model.named_parameters():
        if not set(trained).isdisjoint(name.split(".")):
            state[f"base_model.model.{name}"] = parameter
    for name, layer in layers:
        A, B = layer.to_lora()
        state[f"base_model.model.{name}.lora_A.weight"] = A
        state[f"base_model.model.{name}.lora_B.weight"] = B
    peft.set_peft_model_state_dict(theirs, state)
    theirs.save_pretrained(folder)


def main(folder=None):
    """Export, open, merge, print, and return the three models' logits."""
    torch.manual_seed(0)
    folder = folder or tempfile.mkdtemp()
    base = LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.1))
    model = copy.deepcopy(base)
    add_lora2(model, ["q_proj", "v_proj", "down_proj"], k=4, r=8, trainable=HEAD)
    for parameter in model.parameters():
        if parameter.requires_grad:  # in place of training
            torch.nn.init.normal_(parameter, std=0.3)

    ids = torch.randint(16, (4, 9))
    export_peft(model, copy.deepcopy(base), folder, HEAD)
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    ours, theirs = model(ids).logits, opened(ids).logits
    merged = opened.merge_and_unload()(ids).logits
    print(f"opened by peft: the same logits to {(ours - theirs).abs().max():.0e},",
          f"merged there: {(ours - merged).abs().max():.0e}")
    return ours, theirs, merged


if __name__ == "__main__":
    main()
