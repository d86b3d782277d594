"""What the README promises: its commands parse, its code runs, its files are there."""
import re
import shlex
from pathlib import Path

import pytest
import torch

import options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_option_named_in_the_readme_exists():
    """Oracle: the option table of the command line."""
    known = {f"--{name}" for group in options.OPTIONS.values() for name, *_ in group}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    foreign = {"--no-deps", "--help", "--nproc"}           # of pip, argparse and torchrun (--nproc_per_node)
    assert "--task" in named and named <= known | foreign


def test_every_command_of_train_py_parses():
    """Oracle: the parser itself, on the README's lines as they stand."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if "train.py" in line]
    assert lines
    for line in lines:
        words = shlex.split(line.split("train.py", 1)[1], comments=True)
        options.parse(words)


def test_the_two_set_up_lines_stand_alone():
    """Oracle: the lines that the continuous integration runs, to the letter."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert "pip install -r requirements.txt && python train.py --task demo" in lines
    assert "pip install -r requirements.txt && pytest" in lines


def test_the_table_of_files_is_true():
    """Oracle: the files, whose lines are counted; the table may lag behind by a tenth."""
    rows = dict(re.findall(r"^\| \[(\S+)\]\(\1\) \| (\d+) \|", README, re.MULTILINE))
    assert {"lora2.py", "model.py", "train.py", "data.py", "test_lora2.py"} <= rows.keys()
    for name, lines in rows.items():
        true = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(lines) - true) <= 0.1 * true, (name, lines, true)


def test_the_example_for_your_own_model_runs():
    """Oracle: the pruner's count after the loop, and plain nn.Linear layers after merging."""
    code, = blocks("python")
    model = torch.nn.Sequential()
    model.query, model.value, model.classifier = (torch.nn.Linear(16, 16) for _ in range(3))
    names = {"model": model, "torch": torch, "T": 20, "loader": [torch.randn(4, 16) for _ in range(20)],
             "task_loss": lambda model, batch: model(batch).square().mean()}
    exec(code, names)
    assert names["names"] == ["query", "value"] and sum(names["pruner"].kept().values()) == 2 * 2
    assert type(model.query) is torch.nn.Linear


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_inside_the_repository_resolve(target):
    """Oracle: the file system."""
    assert (ROOT / target).exists()
