"""`python train.py --task demo`: the whole method in a minute, without a download.

A small DeBERTa is pretrained on a made-up language (data.demo_language), saved and loaded as a checkpoint like any
other, frozen, and adapted to a question that its hidden states do not answer. A new head alone fails; LoRA² at k = 1
succeeds, because the answer only needs attention to be re-routed, a rank-1 change. Everything goes through the
train.start() and train.complete() of a GLUE run, and what is printed comes from the result.json files.
"""
from pathlib import Path

import safetensors.torch
import torch

import data
import hub
import model as models
import options
import runs
import train

CONFIG = {"model_type": "deberta-v2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
          "max_position_embeddings": 32, "position_buckets": 16, "initializer_range": 0.05, "norm_rel_ebd": "layer_norm",
          "relative_attention": True, "position_biased_input": False, "share_att_key": True, "pos_att_type": "p2c|c2p"}
WAYS = {"head only": ["--method", "head", "--lr", "5e-3"],
        "LoRA² k=1, pruned": ["--method", "lora2", "--k", "1", "--init", "orthonormal"],
        "full fine-tuning": ["--method", "full", "--lr", "1e-3"]}


def write_checkpoint(folder, config, weights):
    """A folder as the Hub ships a pretrained model: config, the encoder's weights without a head, the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone = {name: tensor.contiguous() for name, tensor in weights.items() if name.startswith("deberta.")}
    runs.write_json(folder / "config.json", config)
    runs.write_file(folder / "model.safetensors", safetensors.torch.save(backbone, metadata={"format": "pt"}))
    runs.write_file(folder / "tokenizer.json", data.demo_tokenizer().to_str())


def pretrain(out, seed):
    """Pretrain from random weights until the cued word's class is told in 99.5 % of unseen sentences."""
    config = CONFIG | {"vocab_size": data.demo_tokenizer().get_vocab_size()}
    torch.manual_seed(seed)
    net = models.SequenceClassifier(models.check_config(dict(config), "the demo's config") | {"cls_dropout": 0.0}, 4)
    for name, parameter in net.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=config["initializer_range"])
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    write_checkpoint(out / "random", config, net.state_dict())
    run = train.start(options.parse(["--task", "demo", "--method", "full", "--model", str(out / "random"), "--out",
                                   str(out / "pretraining"), "--overwrite", "--lr", "2e-3", "--batch-size", "64",
                                   "--epochs", "6", "--eval-steps", "100", "--stop-at", "0.995", "--seed", str(seed)]),
                      data.DEMO_PRETRAIN)
    train.complete(run)
    write_checkpoint(out / "base", config, run.net.state_dict())


def main(given):
    """Run the demo in the folder given["out"]; {way: its result.json}."""
    torch.set_num_threads(1)                               # matrices this small are slower on several cores
    out, seed = Path(given.get("out", "runs/demo")), given.get("seed", 0)
    print("1. Pretraining a small DeBERTa. The question: of which class is the word that the cue names?\n")
    pretrain(out, seed)
    print("\n2. A new question for the frozen model: is the word of role 3 of class 2 or 3?")
    for way, extra in WAYS.items():
        print(f"\n{way}")
        folder = out / extra[1]
        train.complete(train.start(options.parse(["--task", "demo", "--model", str(out / "base"), "--out", str(folder),
                                                "--overwrite", "--seed", str(seed)] + extra)))
    results = {way: hub.read_json(out / extra[1] / "result.json") for way, extra in WAYS.items()}
    print("\n3. On 1,000 sentences that were never seen:\n\n" + " " * 19
          + "accuracy    adapter       head  kept singular values")
    for way, result in results.items():
        kept = f"{result['kept']} of {result['budget']}" if result["kept"] is not None else "-"
        print(f"{way:19}{result['last']['scores']['dev']['accuracy']:8.3f} {result['adapter_parameters']:10,} "
              f"{result['head_parameters']:10,}  {kept}")
    return results
