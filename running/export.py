"""What a finished run hands out: predictions, a merged model, a LoRA for peft."""
from pathlib import Path

import torch

import model as models
from formats import checkpoint, glue, hub
from formats.disk import writing
from lora2 import lora2_layers, merge_lora2


def write_outputs(o, task, net, predicted, outputs):
    """--predict, --export-peft and --merge, in this order, of the adapters the model now holds.

    predicted: for the file of --predict, (N,), or None; outputs: the model's, (N, labels).
    """
    if predicted is not None:
        probabilities = outputs.softmax(1) if o.predict_scores else None
        path = glue.write_submission(o.out, task, predicted, Path(o.predict).stem, probabilities)
        print(f"predictions for {o.predict} are in {path}")
    if o.export_peft or o.merge:
        fold_unit(net, task)
    if o.export_peft:
        with writing(o.export_peft):
            as_peft(net, o.export_peft, o.model)
        other = ", ignore_mismatched_sizes=True" if net.new_weights else ""   # the base's own head
        print(f"the adapter as a LoRA for peft is in {o.export_peft}: there give num_labels="
              f"{net.num_labels}{other}")
    if o.merge:
        with writing(o.merge):
            models.save_pretrained(merge_lora2(net), o.merge)
        print(f"the merged model is in {o.merge}")


@torch.no_grad()
def fold_unit(net, task):
    """Let a regression's last layer give scores in the training file's unit, for other programs."""
    mean, deviation = task.unit
    _, last = net.head_layers().values()
    last.weight.mul_(deviation)
    last.bias.mul_(deviation).add_(mean)


def as_peft(net, folder, base_name):
    """Write a folder that peft opens: each update as its LoRA (exact), head and tokenizer.

    base_name: the checkpoint that the adapter belongs to. A name on the Hub is written, for peft to
    find it; a folder is not: it is a place on this machine.
    """
    layers = lora2_layers(net)
    tensors = {name: p for name, p in net.named_parameters()
               if models.in_head(name, net.head_parts)}
    for name, layer in layers:
        A, B = layer.to_lora()                             # (k, d_in), (d_out, k)
        tensors[f"{name}.lora_A.weight"] = A
        tensors[f"{name}.lora_B.weight"] = B
    tensors = {f"base_model.model.{name}": t.detach().contiguous() for name, t in tensors.items()}
    rank = layers[0][1].k                                  # of a plain LoRA its own rank
    base, revision = hub.split_revision(base_name)
    if Path(base_name).is_dir():                           # a folder's name is not for others
        base, revision = None, None
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS",
        "base_model_name_or_path": base, "revision": revision,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": [name for name, _ in layers], "modules_to_save": net.head_parts}
    checkpoint.write(folder, config, tensors, tokenizer_of=net.source, prefix="adapter_")
