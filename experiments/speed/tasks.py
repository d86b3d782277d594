"""Rows 9, 12 and 13 of bench.py, which need the tasks' own files: tokens, epochs, texts to ids."""
import random
import time

import torch

import data
import train
from experiments.speed import peers, steps, table
from formats import glue
from running import options

TASKS = ("rte", "mrpc", "stsb", "cola")


def count_tokens(job):
    """Row 9: what an epoch's batches of 32 hold, padding included, per token of the data."""
    for task in TASKS:
        split = glue.load_split(data.TASKS[task], job.data_dir, "train")
        tokenizer = data.load_tokenizer(job.model)
        examples = data.encode(tokenizer, split, options.PRESETS[task]["max_len"])
        batches = data.batches(examples, 32, 0, torch.Generator().manual_seed(0))
        masks = [batch.attention_mask for batch in batches]
        total = sum(mask.numel() for mask in masks)
        real = sum(int(mask.sum()) for mask in masks)
        job.results[f"9 {task}"] = table.summary([total / real], processed=total, real=real)


def time_epochs(job):
    """Row 12, one of each in turn."""
    epochs(job, TASKS[-1], 32)                             # warms up
    for task in TASKS:
        ours, theirs = epochs(job, task, job.epoch_rows)
        more = {"own_seconds": [ours], "peer_seconds": [theirs], "rows": job.epoch_rows or "all"}
        job.results[f"12 {task}"] = table.summary([theirs / ours], **more)


def epochs(job, task, rows):
    """Seconds of an epoch on a task's first `rows` (0: all): (train.py's, the peer's).

    Both as a user starts them, without imports, with a new selection at every step.
    """
    words = ["--task", task, "--model", job.model, "--data-dir", job.data_dir,
             "--out", str(job.work / "epoch"), "--device", job.device, "--dtype", job.dtype]
    words += "--k 8 --r 8 --epochs 1 --limit-dev 1 --overwrite".split()
    words += "--prune-warmup 0 --prune-final 0 --prune-interval 1".split()
    if rows:
        words += ["--limit-train", str(rows)]
    start = time.perf_counter()
    status, said = steps.heard(train.main, words)
    ours = time.perf_counter() - start
    if status:
        raise RuntimeError(f"train.py ended with {status}: {said[-2000:]}")
    theirs, _ = steps.heard(peers.epoch, job.model, task, job.data_dir, rows,
                            options.PRESETS[task]["max_len"], job.device, job.dtype)
    return ours, theirs


# --- row 13: DeBERTaV3's spm.model with SentencePiece, with transformers and with us -----------

def own(folder):
    """A function from texts to their ids, as each of the three is started by a user."""
    tokenizer = data.load_tokenizer(folder)
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def transformers(folder):
    """The same of transformers."""
    from transformers import DebertaV2Tokenizer
    tokenizer = DebertaV2Tokenizer.from_pretrained(folder)
    return lambda texts: tokenizer(texts)["input_ids"]


def sentencepiece(folder):
    """The same of SentencePiece, without [CLS] and [SEP]."""
    from sentencepiece import SentencePieceProcessor
    return SentencePieceProcessor(model_file=f"{folder}/spm.model").encode


READERS = {"SentencePiece": sentencepiece, "transformers": transformers, "own": own}


def time_texts(job, most=40_000):
    """Row 13: the tasks' first different texts to ids, and the time to read the file."""
    found = {}
    for task in TASKS:
        for name in ("train", "dev"):
            for row in glue.load_split(data.TASKS[task], job.data_dir, name).texts:
                found |= dict.fromkeys(row)
    texts = list(found)[:most]
    read, used = measure_texts(job.spm, texts, job.rounds)
    for name in READERS:
        job.details[f"texts, {name}"] = {
            "texts a second": table.summary(len(texts) / seconds for seconds in used[name]),
            "seconds to read": table.summary(read[name])}
    job.results["13"] = table.paired(used["transformers"], used["own"])
    job.results["13 library"] = table.paired(used["SentencePiece"], used["own"])
    job.results["13 read"] = table.summary(read["own"])
    job.results["13 peer"] = table.summary(read["transformers"])


def measure_texts(folder, texts, rounds):
    """({name: seconds to read the file}, {name: seconds for the texts}), lists: one a round.

    Each round reads the file anew, so that no cache knows the texts, and after one that warms up.
    ValueError where more than one text in 10,000 gets other ids than SentencePiece's from us.
    """
    ids = {name: reader(folder)(texts) for name, reader in READERS.items()}
    wrong = sum(a[1:-1] != b for a, b in zip(ids["own"], ids["SentencePiece"]))
    if wrong > len(texts) / 10_000:
        raise ValueError(f"{wrong} of {len(texts)} texts have other ids than SentencePiece's")
    read, used = ({name: [] for name in READERS} for _ in range(2))
    rng = random.Random(0)
    for _ in range(rounds):
        for name in rng.sample(list(READERS), len(READERS)):
            start = time.perf_counter()
            encode = READERS[name](folder)
            half = time.perf_counter()
            encode(texts)
            read[name].append(half - start)
            used[name].append(time.perf_counter() - half)
    return read, used
