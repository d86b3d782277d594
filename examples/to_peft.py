"""LoRA² handed out as a plain LoRA of rank k, which is exact: peft opens, serves and merges it.

    python examples/to_peft.py

    opened by peft: the same logits to 2e-06, merged there: 2e-06
"""
import copy
import sys

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(sys.path[0] + "/..")  # to run from a clone

from lora2 import add_lora2, lora2_layers


def export_peft(model, base, folder, trained=()):
    """Write the adapters of `model` for peft, and what else was trained. base: without adapters."""
    layers = lora2_layers(model)
    k = layers[0][1].k
    config = peft.LoraConfig(r=k, lora_alpha=k, target_modules=[name for name, _ in layers],
                             modules_to_save=list(trained) or None)
    theirs = peft.get_peft_model(base, config)
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


torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(
    vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, initializer_range=0.1))
model = copy.deepcopy(base)
add_lora2(model, ["q_proj", "v_proj", "down_proj"], k=4, r=8, trainable=["lm_head"])
for parameter in model.parameters():
    if parameter.requires_grad:  # in place of training
        torch.nn.init.normal_(parameter, std=0.3)

export_peft(model, copy.deepcopy(base), "runs/to_peft", ["lm_head"])
opened = peft.PeftModel.from_pretrained(base, "runs/to_peft")
ids = torch.randint(16, (4, 9))
ours = model(ids).logits
error = (opened(ids).logits - ours).abs().max()
merged = (opened.merge_and_unload()(ids).logits - ours).abs().max()
print(f"opened by peft: the same logits to {error:.0e}, merged there: {merged:.0e}")
