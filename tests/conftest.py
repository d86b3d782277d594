"""What the tests of the training program share: small checkpoints made on the spot and a way to run it."""
import functools
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""                    # the numbers they expect are a CPU's

import pytest
import torch

from formats import toy
import model as models
import train
from lora2 import load_lora2_state_dict
from running import folder, machine, options
from running.errors import user_errors
from tests.checkpoints import write

# A shell that starts the tests in the background has them, and the programs they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
          "max_position_embeddings": 40, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
          "initializer_range": 0.05}
CONFIGS = {
    "deberta": COMMON | {"model_type": "deberta-v2", "relative_attention": True, "position_buckets": 8,
                         "position_biased_input": False, "norm_rel_ebd": "layer_norm",
                         "share_att_key": True, "pos_att_type": "p2c|c2p"},
    "bert": COMMON | {"model_type": "bert"},
    "roberta": COMMON | {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 0}}

made_once = functools.lru_cache(None)(toy.language)         # a fifth of the time of a tiny run
SMALL = "--limit-train 96 --limit-dev 64 --batch-size 16 --lr 0.02 --max-steps 12"


def write_checkpoint(folder, name, seed=0, **changes):
    """A folder as the Hub ships it: config.json, an encoder with random weights, the demo's tokenizer."""
    tokenizer = toy.tokenizer()
    config = CONFIGS[name] | {"vocab_size": tokenizer.get_vocab_size()} | changes
    torch.manual_seed(seed)
    net = models.SequenceClassifier(models.check_config(dict(config), folder), 2)
    weights = {key: torch.randn_like(tensor) * 0.2 if tensor.dim() == 2 else tensor
               for key, tensor in net.state_dict().items() if key.startswith(name) and "pooler" not in key}
    write(folder, config, weights)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(toy.BESIDE))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """{name: folder} of three small checkpoints; "still" is the DeBERTa without dropout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {name: write_checkpoint(folder / name, name) for name in CONFIGS} | {
        "still": write_checkpoint(folder / "still", "deberta", **still)}


@pytest.fixture
def one_thread():
    """Matrices this small are slower on several cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hf(monkeypatch):
    """transformers, silent, and without the one float32 rounding in its float64 DeBERTa (the scale)."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from transformers.models.deberta_v2 import modeling_deberta_v2
    rounded = modeling_deberta_v2.scaled_size_sqrt

    def scale(query, factor):
        exact = query.dtype == torch.float64
        return torch.tensor(query.size(-1) * factor).double().sqrt() if exact else rounded(query, factor)
    monkeypatch.setattr(modeling_deberta_v2, "scaled_size_sqrt", scale)
    return transformers


@pytest.fixture(scope="session")
def wholes():
    """What cli.whole() has found so far."""
    return {}


@pytest.fixture
def cli(tiny, wholes, tmp_path, monkeypatch, capsys, one_thread):
    """cli("--k 1", ...) runs train.py in this process, in an empty folder: its status, output and errors.

    cli.tiny(...) is such a run: 12 steps, 6 to an epoch, with dropout, in about a fifth of a second.
    cli.whole(...) is the outcome() of a tiny run that nothing breaks; it is made once for all tests.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "language", made_once)

    def run(*words):
        status = train.main([part for word in words
                             for part in ([str(word)] if isinstance(word, Path) else word.split())])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
        return SimpleNamespace(status=status, out=out, err=err, errors=errors)

    def whole(words=""):
        if words not in wholes:
            assert run.tiny(words, out="whole").status == 0
            wholes[words] = outcome("whole")
            shutil.rmtree("whole")
        return wholes[words]

    run.models = tiny
    run.whole = whole
    run.tiny = lambda *words, model="deberta", out="run": run(
        "--task demo --model", tiny[model], SMALL, "--out", Path(out), *words)
    return run


def opened(**given):
    """What --eval works with, from its options: a namespace of o, here, task, examples, unseen and net."""
    with user_errors():
        tensors, stored = folder.load_adapter(given["eval"])
        o = options.evaluating(stored["settings"], given)
        here = machine.join(o.device, o.dtype)
        task, examples, unseen, net, _ = train.prepare(o, here, stored)
        load_lora2_state_dict(net, tensors)
    return SimpleNamespace(o=o, here=here, task=task, examples=examples, unseen=unseen, net=net)


def frozen(value):
    """Tensors as bytes, in dicts and lists: what can be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return [frozen(item) for item in value] if isinstance(value, (list, tuple)) else value


def outcome(folder):
    """What of a run must not depend on time, place and interruptions: {file: content}."""
    folder = Path(folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    volatile = ("tokens_per_second", "seconds", "date", "peak_memory_gb", "out", "save_steps", "hash")
    for record in lines + [result, result["settings"]]:
        for name in volatile:
            record.pop(name, None)
    files = {path.name: path.read_bytes() for path in folder.iterdir()       # a kill may leave a folder
             if path.is_file() and path.name not in ("last.pt", "log.jsonl", "result.json")}
    return files | {"log.jsonl": lines, "result.json": result}
