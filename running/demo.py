"""`python train.py --task demo`: the whole method in a minute, without a download.

A small DeBERTa is pretrained on a made-up language (formats/toy.py), saved and loaded as a checkpoint
like any other, frozen, and adapted to a question that its hidden states do not answer. A new head alone
gets a half to three quarters right, LoRA² at k = 1 all: attention is re-routed, a rank-1 change. All goes by
start() and complete() as a GLUE run does, and what is printed at the end comes from the result.json files.
"""
import os
from pathlib import Path

import torch

from formats import disk
from formats import hub
from formats import toy
import model as models
from running import options
from running import folder as runs
import train

# A feed-forward layer this narrow cannot hold what all six roles say and choose between them later. So the
# model learns to attend to the word that the cue names, and its output says nothing of the others.
CONFIG = {"model_type": "deberta-v2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
          "max_position_embeddings": 32, "position_buckets": 16, "initializer_range": 0.05,
          "norm_rel_ebd": "layer_norm", "relative_attention": True, "position_biased_input": False,
          "share_att_key": True, "pos_att_type": "p2c|c2p"}
PRETRAINING = ["--method", "full", "--lr", "2e-3", "--warmup", "85", "--batch-size", "64", "--epochs", "6",
               "--max-len", "16", "--head-dropout", "0", "--weight-decay", "0", "--eval-steps", "100",
               "--stop-at", "0.995"]
WAYS = {"head only": ["--method", "head", "--lr", "5e-3"],
        "LoRA² k=1, pruned": ["--method", "lora2", "--k", "1", "--init", "orthonormal"],
        "full fine-tuning": ["--method", "full", "--lr", "1e-3"]}


def write_base(folder, config, weights):
    """A folder as the Hub ships a pretrained model: config, the encoder's weights, the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone = {name: tensor for name, tensor in weights.items() if name.startswith("deberta.")}
    disk.write_json(folder / "config.json", config)
    disk.write_tensors(folder / "model.safetensors", backbone, {"format": "pt"})
    disk.write_file(folder / "tokenizer.json", toy.tokenizer().to_str())
    disk.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_random_model(folder, seed):
    """A checkpoint with weights drawn from the seed; returns its config."""
    config = CONFIG | {"vocab_size": toy.tokenizer().get_vocab_size()}
    torch.manual_seed(seed)
    net = models.SequenceClassifier(models.check_config(dict(config), folder) | {"cls_dropout": 0.0}, 4)
    for name, parameter in net.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=config["initializer_range"])
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    write_base(folder, config, net.state_dict())
    return config


def write_pretraining_data(folder):
    """train.tsv and dev.tsv of the question to pretrain on, as a user's own data; returns their options."""
    words = []
    for name, split in toy.splits("pretrain", toy.PRETRAINING_ROWS).items():
        path = folder / f"{name}.tsv"
        rows = (f"{text}\t{label}\n" for (text,), label in zip(split.texts, split.labels))
        disk.write_file(path, "sentence\tlabel\n", *rows)
        words += [f"--{name}-file", str(path)]
    return words


def train_one(model, out, seed, *words):
    """One run, as by train.py with these options, on any machine the same; returns the finished run."""
    run = train.start(options.parse(["--model", str(model), "--out", str(out), "--overwrite", "--seed",
                                     str(seed), "--device", "cpu", "--dtype", "fp32", *words]))
    train.complete(run)
    return run


def main(given):
    """Run the demo in the folder given["out"]; {way: its result.json}."""
    with runs.refusing():
        strange = given.keys() - {"task", "out", "seed", "overwrite"}
        settings = options.resolve({"out": "runs/demo", "overwrite": "out" not in given} | given)
        out, seed = Path(settings["out"]), settings["seed"]
        if strange or os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("the demo is one process and takes --out and --seed alone: for more, run it "
                             f"first, then give its model as --model {out / 'base'}")
        runs.check_destinations(settings, resumed=False)
    torch.set_num_threads(1)                               # matrices this small are slower on several cores
    print("1. Pretraining a small DeBERTa. The question: of which class is the word that the cue names?\n")
    config = write_random_model(out / "random", seed)
    question = write_pretraining_data(out / "random")
    pretrained = train_one(out / "random", out / "pretraining", seed, *question, *PRETRAINING)
    write_base(out / "base", config, pretrained.net.state_dict())
    print("\n2. A new question for the frozen model: is the word of role 3 of class 2 or 3?")
    for way, extra in WAYS.items():
        print(f"\n{way}")
        train_one(out / "base", out / extra[1], seed, "--task", "demo", *extra)
    results = {way: hub.read_json(out / extra[1] / "result.json") for way, extra in WAYS.items()}
    print("\n3. On 1,000 sentences that were never seen:\n\n" + " " * 19
          + "accuracy    adapter       head  kept singular values")
    for way, result in results.items():
        kept = f"{result['kept']} of {result['singular_values']}" if result["kept"] is not None else "-"
        accuracy = result["last"]["scores"]["dev"]["accuracy"]
        numbers = "".join(f"{result[name]:11,}" for name in ("adapter_parameters", "head_parameters"))
        print(f"{way:19}{accuracy:8.3f}{numbers}  {kept}")
    return results
