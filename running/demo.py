"""`python train.py --task demo`: the whole method in a minute, without a download.

A small DeBERTa is pretrained on a made-up language (formats/toy.py), saved and loaded as a
checkpoint like any other, frozen, and adapted to a question that its hidden states do not answer. A
new head alone gets a half to three quarters right, LoRA² at k = 1 all: attention is re-routed, a
rank-1 change. Each part is a run of train.py like any other, and what is printed at the end comes
from the result.json files.
"""
from pathlib import Path

import torch

import model as models
from formats import disk, toy
from formats.config import check_config
from running import folder, machine, options, saving
from running.errors import user_errors

# A feed-forward layer this narrow cannot hold what all six roles say and choose between them later.
# So the model learns to attend to the word that the cue names, and its output says nothing of the
# others.
CONFIG = {"model_type": "deberta-v2", "hidden_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "intermediate_size": 32, "hidden_dropout_prob": 0.0,
          "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32,
          "position_buckets": 16, "initializer_range": 0.05,
          "norm_rel_ebd": "layer_norm", "relative_attention": True, "position_biased_input": False,
          "share_att_key": True, "pos_att_type": "p2c|c2p"}
PRETRAINING = ("--method full --lr 2e-3 --warmup 85 --batch-size 64 --epochs 6 --max-len 16 "
               "--head-dropout 0 --weight-decay 0 --eval-steps 100 --stop-at 0.995").split()
WAYS = {"head only": ["--method", "head", "--lr", "5e-3"],
        "LoRA² k=1, pruned": ["--method", "lora2", "--k", "1", "--init", "orthonormal"],
        "full fine-tuning": ["--method", "full", "--lr", "1e-3"]}


def write_base(path, config, weights):
    """A folder as the Hub ships a pretrained model: config, encoder weights, tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    backbone = {name: tensor for name, tensor in weights.items() if name.startswith("deberta.")}
    disk.write_json(path / "config.json", config)
    disk.write_tensors(path / "model.safetensors", backbone, {"format": "pt"})
    disk.write_file(path / "tokenizer.json", toy.tokenizer().to_str())
    disk.write_json(path / "tokenizer_config.json", toy.BESIDE)


def write_random_model(path, seed):
    """A checkpoint with weights drawn from the seed; returns its config."""
    config = CONFIG | {"vocab_size": toy.tokenizer().get_vocab_size()}
    torch.manual_seed(seed)
    whole = check_config(dict(config), path) | {"cls_dropout": 0.0}
    net = models.SequenceClassifier(whole, 4)
    for name, parameter in net.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=config["initializer_range"])
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    write_base(path, config, net.state_dict())
    return config


def write_pretraining_data(path):
    """train.tsv and dev.tsv of the first question, as a user's own data; returns their options."""
    words = []
    for name, split in toy.splits("pretrain", toy.PRETRAINING_ROWS).items():
        file = path / f"{name}.tsv"
        rows = (f"{text}\t{label}\n" for (text,), label in zip(split.texts, split.labels))
        disk.write_file(file, "sentence\tlabel\n", *rows)
        words += [f"--{name}-file", str(file)]
    return words


def run(train, model, out, seed, *words):
    """One run of train.py with these options, on any machine the same."""
    common = ["--model", str(model), "--out", str(out), "--overwrite", "--seed", str(seed)]
    train(options.resolve(options.parse([*common, "--device", "cpu", "--dtype", "fp32", *words])))


def main(given, train):
    """Run the demo in the folder given["out"]; {way: result}. train: train.py's function."""
    out, seed = place_and_seed(given)
    torch.set_num_threads(1)  # matrices this small are slower on several cores
    print("1. Pretraining a small DeBERTa. The question: of which class is the word that the cue "
          "names?\n")
    config = write_random_model(out / "random", seed)
    question = write_pretraining_data(out / "random")
    run(train, out / "random", out / "pretraining", seed, *question, *PRETRAINING)
    write_base(out / "base", config, folder.load_state(out / "pretraining")["weights"])
    print("\n2. A new question for the frozen model: is the word of role 3 of class 2 or 3?")
    for way, words in WAYS.items():
        print(f"\n{way}")
        run(train, out / "base", out / words[1], seed, "--task", "demo", *words)
    results = {way: disk.read_object(out / words[1] / "result.json") for way, words in WAYS.items()}
    print_table(results)
    return results


@user_errors()
def place_and_seed(given):
    """Where the demo runs, and its seed. Refused: other options, a folder of somebody else."""
    strange = given.keys() - {"task", "out", "seed", "overwrite"}
    o = options.resolve({"out": "runs/demo", "overwrite": "out" not in given} | given)
    out = Path(o.out)
    if strange or machine.number_from("WORLD_SIZE", 1) > 1:
        raise ValueError("the demo is one process and takes --out and --seed alone: for more, run "
                         f"it first, then give its model as --model {out / 'base'}")
    saving.check_destinations(o)
    return out, o.seed


def print_table(results):
    """The last lines of the demo, from {way: its result.json}."""
    print("\n3. On 1,000 sentences that were never seen:\n\n" + " " * 19
          + "accuracy    adapter       head  kept singular values")
    for way, result in results.items():
        kept = "-"
        if result["kept"] is not None:
            kept = f"{result['kept']} of {result['singular_values']}"
        accuracy = result["last"]["scores"]["dev"]["accuracy"]
        body, head = result["adapter_parameters"], result["head_parameters"]
        print(f"{way:19}{accuracy:8.3f}{body:11,}{head:11,}  {kept}")
