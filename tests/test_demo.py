"""Tests of running/demo.py: what `--task demo` promises."""
import re
import time
from pathlib import Path

import pytest
import torch

import data
from formats import toy
from running import demo
import model as models
import train
from tests.conftest import opened
from lora2 import lora2_layers
from methods import fast


def test_checkpoint_is_like_any_other(tmp_path):
    """Oracle: what the loader of the Hub's checkpoints makes of the folder, seed by seed."""
    nets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo.write_random_model(tmp_path / name, seed)
        nets.append(models.from_pretrained(tmp_path / name, 2).backbone.state_dict())
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert not torch.equal(*(nets[i]["embeddings.word_embeddings.weight"] for i in (0, 2)))
    assert data.load_tokenizer(tmp_path / "a").get_vocab() == toy.tokenizer().get_vocab()


def test_transformers_opens_the_tokenizer(tmp_path):
    """Oracle: AutoTokenizer on the folder gives the ids of our own tokenizer."""
    transformers = pytest.importorskip("transformers")
    demo.write_random_model(tmp_path, 0)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), toy.tokenizer()
    for pair in (("cue0 filler1 role2word3",), ("cue1 no-word", "filler0")):
        assert theirs(*pair).input_ids == ours.encode(*pair).ids


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_demo(tmp_path, monkeypatch, capsys, seed):
    """Oracle: the promised bounds; the base model, with the adapter off. (What is printed: test_readme.py.)"""
    monkeypatch.chdir(tmp_path)
    before, threads = time.process_time(), torch.get_num_threads()
    results = demo.main({"task": "demo", "seed": seed}, train.train)
    torch.set_num_threads(threads)
    seconds = time.process_time() - before
    head, lora2, full = (result["last"]["scores"]["dev"]["accuracy"] for result in results.values())
    text = capsys.readouterr().out
    print(f"seed {seed}: head {head}, LoRA² {lora2}, full {full}, {seconds:.0f} s of one core")
    assert head <= 0.80 and lora2 >= 0.95 and full >= 0.95 and seconds <= 60

    run = opened(eval="runs/demo/lora2/adapter.safetensors", model="runs/demo/base")
    base = models.from_pretrained("runs/demo/base", 2)
    fast.speed_up(base, "fp32", False)                     # the plain form rounds otherwise
    batch = next(data.batches(run.examples["dev"], 100))
    hidden = [net.eval().encode(*batch[:3]) for net in (run.net, base)]
    assert not torch.allclose(*hidden, atol=0.1)
    for _, layer in lora2_layers(run.net):
        layer.lam.data.zero_()
    assert torch.equal(run.net.encode(*batch[:3]), hidden[1])
    assert Path("runs/demo/lora2/ranks.json").exists()
    commands = re.findall(r"^  python train.py (--eval .*)", text, re.MULTILINE)
    assert len(commands) == 4 and all(train.main(command.split()) == 0 for command in commands)
