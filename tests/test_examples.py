"""The programs of examples/, each run whole where its library is installed, and watched: tests/watch.py says what
every host has to do. Each docstring names its oracle."""
import ast
import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from examples import planted
from lora2 import lora2_layers, lora2_state_dict
from methods.hosts import rebuild
from tests import watch

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")]
NEEDS = {"any_model": "torch", "planted": "torch", "in_fsdp2": "torch", "in_accelerate": "accelerate",
         "in_lightning": "lightning", "in_trainer": "transformers accelerate", "gpt2": "transformers",
         "language_model": "transformers", "image_model": "transformers", "quantised": "bitsandbytes",
         "to_peft": "transformers peft"}
TOKENS, NUMBERS = torch.arange(8)[None], torch.linspace(-1, 1, 64)[None]
INPUT = {"any_model": NUMBERS[:, :8], "in_accelerate": NUMBERS[:, :8], "in_lightning": NUMBERS[:, :8],
         "in_trainer": TOKENS, "gpt2": TOKENS, "language_model": TOKENS, "quantised": NUMBERS,
         "image_model": torch.linspace(-1, 1, 768).view(1, 3, 16, 16)}
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-\d+)?")


@pytest.fixture(autouse=True)
def where_a_run_may_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def needed(name):
    for library in NEEDS[name].split():
        pytest.importorskip(library)


def python(*words):
    """The output of a program, which must succeed."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def alike(printed, shown):
    """Whether two lines have the same words, numbers to 0.1, and rounding errors below 1e-4."""
    if NUMBER.sub("#", printed).strip() != NUMBER.sub("#", shown).strip():
        return False
    for number, expected in zip(NUMBER.findall(printed), NUMBER.findall(shown)):
        if abs(float(number) - float(expected)) > (1e-4 if "e-" in number else 0.1):
            return False
    return True


def assert_as_promised(name, text):
    """What a program of at most 60 lines printed has a line like each that its docstring shows."""
    source = (watch.EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(source), clean=False)
    shown = re.findall(r"^    (?!python |torchrun |accelerate ).+", doc, re.MULTILINE)
    assert shown and source.count("\n") <= 60
    for line in shown:
        assert any(alike(printed, line) for printed in text.splitlines()), (line, text)


def assert_saved_whole(name, model):
    """The file gives the same logits, bit for bit, on the base with strange numbers where something was trained."""
    state, base = lora2_state_dict(model), copy.deepcopy(model)
    for adapter, layer in lora2_layers(base):
        base.set_submodule(adapter, layer.base)
    for key, parameter in base.named_parameters():
        if key in state:
            torch.nn.init.constant_(parameter, 0.1)
    if hasattr(base, "pruner"):
        del base.pruner
    torch.save(state, "adapters.pt")
    rebuild(base, torch.load("adapters.pt", weights_only=True))
    with torch.no_grad():
        y, again = (each.eval()(INPUT[name]) for each in (model, base))
    assert torch.equal(getattr(again, "logits", again), getattr(y, "logits", y))


@pytest.mark.parametrize("name", INPUT)
def test_a_host_does_what_it_must(name, capsys):
    """Oracle: counting, and R's own gradient: one pruner step per optimizer step, gradients in every factor, R
    once, kept = nonzero Λ = budget; the docstring, whose numbers say that something was learned; its own logits."""
    needed(name)
    variables, seen = watch.run(name)
    watch.check(seen)
    assert_as_promised(name, capsys.readouterr().out)
    if name == "in_trainer":                               # as it was before Trainer put autocast around it
        variables["trainer"].accelerator.unwrap_model(seen.model, keep_fp32_wrapper=False)
    assert_saved_whole(name, seen.model)


@pytest.mark.parametrize("name", ["to_peft", "planted"])
def test_other_programs(name):
    """Oracle: the docstring: logits of peft's model, and ΔW, equal ours to 1e-4. They run from any folder."""
    needed(name)
    assert_as_promised(name, python(watch.EXAMPLES / f"{name}.py"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_what_was_planted_is_found_with_other_seeds(seed, capsys):
    """Oracle: what was planted, a change of rank 4 in the third of four layers; seed 0 is not a lucky one."""
    planted.main(seed=seed)
    table = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines() if line[:4].strip().isdigit()]
    assert table[-1][3] == "[0, 0, 4, 0]" and float(table[-1][1]) < 0.01 * float(table[0][1])


@pytest.mark.parametrize("name", ["in_trainer", "in_accelerate", "in_lightning", "in_fsdp2"])
def test_two_processes_count_R_once(name):
    """Oracle: as for one process, seen in each of the two; their adapters, to the bit; and what is printed."""
    needed(name)
    text = python("-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "tests.watch", name)
    digests = re.findall("as it should be (.{64})", text)
    assert len(digests) == 2 and digests[0] == digests[1]
    assert_as_promised(name, text)


def test_trainer_resumes_and_says_if_it_ends_early(capsys):
    """Oracles: the unbroken run, weights and pruner, bit for bit, from a checkpoint of Trainer, which was not told
    of a pruner; and arithmetic: b(20) = 13 + 39 · (16/30)³ is 18, not 13."""
    needed("in_trainer")
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 20

    variables, _ = watch.run("in_trainer")
    model, trainer = variables["model"], variables["trainer"]
    whole = copy.deepcopy(model.state_dict())
    trainer.train(resume_from_checkpoint="runs/in_trainer/checkpoint-12")
    assert model.pruner.t == 60
    for name, tensor in whole.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    trainer.add_callback(Stop())
    with pytest.warns(UserWarning, match="ended at step 20 of 60: 18 singular values are left"):
        trainer.train(resume_from_checkpoint="runs/in_trainer/checkpoint-12")


def test_lightning_goes_on_from_its_checkpoint(capsys):
    """Oracle: the unbroken run, bit for bit: Lightning saves the pruner as a part of the module. (An epoch is
    one batch: where in an epoch it goes on does not matter.)"""
    needed("in_lightning")
    import lightning

    example, _ = watch.run("in_lightning")
    batches = torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=16)

    def fit(steps, checkpoint=None):
        torch.manual_seed(0)
        module = example["Regression"]()
        trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                                    enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, batches, ckpt_path=checkpoint)
        return module, trainer

    whole, _ = fit(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                    # it ends early
        fit(40)[1].save_checkpoint("some.ckpt")
    again, _ = fit(100, "some.ckpt")
    assert again.pruner.t == 100 and again.pruner.kept() == whole.pruner.kept()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
