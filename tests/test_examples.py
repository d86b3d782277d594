"""The programs of examples/, each run whole where its library is installed, and watched: tests/watch.py says what
every host has to do. Each docstring names its oracle."""
import copy
import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lora2 import lora2_layers, lora2_state_dict
from tests import watch

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")]
NEEDS = {"any_model": "torch", "in_accelerate": "accelerate", "in_lightning": "lightning", "in_trainer": "accelerate",
         "gpt2": "transformers", "language_model": "transformers", "image_model": "transformers",
         "quantised": "bitsandbytes", "in_fsdp2": "torch", "to_peft": "peft"}
TOKENS, NUMBERS = torch.arange(8)[None], torch.linspace(-1, 1, 64)[None]
INPUT = {"any_model": NUMBERS[:, :8], "in_accelerate": NUMBERS[:, :8], "in_lightning": NUMBERS[:, :8],
         "in_trainer": TOKENS, "gpt2": TOKENS, "language_model": TOKENS, "quantised": NUMBERS,
         "image_model": torch.linspace(-1, 1, 768).view(1, 3, 16, 16)}


def needed(name):
    pytest.importorskip(NEEDS[name])
    if name not in ("any_model", "in_fsdp2", "in_accelerate", "in_lightning", "quantised"):
        pytest.importorskip("transformers")


def python(*words, cwd=ROOT):
    """The output of a program, which must succeed."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True,
                          encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def output(model, x):
    with torch.no_grad():
        y = model.eval()(x)
    return getattr(y, "logits", y)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder into which each run puts the base, the adapters' file, an input and the output."""
    return tmp_path_factory.mktemp("saved")


def save_for_another_process(folder, name, model):
    """The base with strange numbers where something was trained: the file must bring all of that."""
    state, base = lora2_state_dict(model), copy.deepcopy(model)
    for adapter, layer in lora2_layers(base):
        base.set_submodule(adapter, layer.base)
    for key, parameter in base.named_parameters():
        if key in state:
            torch.nn.init.constant_(parameter, 0.1)
    if hasattr(base, "pruner"):
        del base.pruner
    torch.save({"base": base, "state": state, "x": INPUT[name], "y": output(model, INPUT[name])}, folder / f"{name}.pt")


@pytest.mark.parametrize("name", INPUT)
def test_a_host_does_what_it_must(name, saved, tmp_path, monkeypatch, capsys):
    """Oracle: counting, and R's own gradient: one pruner step per optimizer step, gradients in every factor, R
    once, kept = nonzero Λ = budget; the printed line says that something was learned."""
    needed(name)
    monkeypatch.chdir(tmp_path)
    result, seen = watch.run(name)
    pruner = seen.pruner
    watch.check(seen, pruner.total_steps)
    watch.check_kept(pruner)
    model = seen.model
    if name == "in_trainer":                               # as it was before Trainer put autocast around it
        result.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    save_for_another_process(saved, name, model)
    text = capsys.readouterr().out
    LEARNED[name](text, result)


def number_after(words):
    return lambda text: float(text.partition(words)[2].split()[0].rstrip(",;%"))


def lower(words, limit):
    """A check that the number after these words is below a limit."""
    def check(text, result):
        assert number_after(words)(text) < limit, text
    return check


def all_true(text, result):
    assert text.count("True") == 1 and "False" not in text and lower("→", 2.6)(text, result) is None


def counts_down(text, result):
    before, after, up = result[2]
    assert before < 0.1 and after > 0.9 and up > 0.9


def sees_stripes(text, result):
    before, after = result[2]
    assert before < 0.7 and after > 0.9


def averaged(text, result):
    assert "averaged: 2 of 8 left" in text and "loaded: True" in text and lower("error", 0.2)(text, result) is None


LEARNED = {"any_model": averaged, "in_accelerate": lower("loss", 0.25), "in_lightning": lower("loss", 0.25),
           "in_trainer": lower("\nloss", 0.3), "gpt2": all_true, "language_model": counts_down,
           "image_model": sees_stripes, "quantised": lower("precision", 0.25)}

LOAD = """
import sys, torch
from methods.hosts import rebuild
for path in sys.argv[1:]:
    saved = torch.load(path, weights_only=False)
    model = saved["base"]
    rebuild(model, saved["state"])
    with torch.no_grad():
        y = model.eval()(saved["x"])
    y = getattr(y, "logits", y)
    assert torch.equal(y, saved["y"]), path
    print(path)
"""


def test_a_fresh_process_gives_the_same_logits(saved):
    """Oracle: the trained model's, bit for bit. The other process has the base and the adapters' file alone."""
    files = sorted(saved.glob("*.pt"))
    if not files:
        pytest.skip("no host was run")
    assert python("-c", LOAD, *files).split() == [str(path) for path in files]


def test_peft_opens_and_merges_the_export(tmp_path):
    """Oracle: the logits of the adapted model, to 1e-4."""
    needed("to_peft")
    ours, theirs, merged = importlib.import_module("examples.to_peft").main(tmp_path)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["in_trainer", "in_accelerate"])
def test_two_processes_count_R_once(name, tmp_path):
    """Oracle: as for one process, seen in each of the two."""
    needed(name)
    text = python("-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "tests.watch", name)
    assert text.count("as it should be") == 2


def test_fsdp2_with_whole_adapters(tmp_path):
    """Oracle: a model that was never sharded, which loads the file and gives the same to 1e-5."""
    text = python("-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "examples" / "in_fsdp2.py")
    assert "kept 2 of 8, loaded: True" in text and number_after("error")(text) < 0.3


def test_trainer_resumes_bit_for_bit(tmp_path, capsys):
    """Oracle: the unbroken run: weights, and the pruner that a checkpoint of Trainer holds without being told."""
    needed("in_trainer")
    example = importlib.import_module("examples.in_trainer")
    whole = example.main(tmp_path / "whole").model
    again = example.main(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-12")).model
    assert again.pruner.t == whole.pruner.t
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_run_that_ends_early_says_so(tmp_path, capsys):
    """Oracle: arithmetic: at step 20 of 60 the budget of 6 is not reached."""
    needed("in_trainer")
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 20

    example = importlib.import_module("examples.in_trainer")
    with pytest.warns(UserWarning, match="ended at step 20 of 60: 8 singular values are left"):
        example.main(tmp_path, callbacks=[Stop()])


def test_lightning_goes_on_from_its_checkpoint(tmp_path, capsys, monkeypatch):
    """Oracle: the pruner of the unbroken run: Lightning saves it as a part of the module."""
    needed("in_lightning")
    monkeypatch.chdir(tmp_path)
    example = importlib.import_module("examples.in_lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                    # the first run ends early
        _, trainer = example.main(tmp_path, steps=40)
        trainer.save_checkpoint(tmp_path / "some.ckpt")
        module, _ = example.main(tmp_path, checkpoint=str(tmp_path / "some.ckpt"))
    assert module.pruner.t == example.T
    watch.check_kept(module.pruner)
