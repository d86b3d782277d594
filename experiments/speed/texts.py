"""Row 13 of bench.py: DeBERTaV3's spm.model with SentencePiece, with transformers and with us."""
import random
import time
from pathlib import Path

import data
from formats import glue, spm


def own(folder):
    """A function from texts to their ids, as each of the three is started by a user."""
    tokenizer = spm.read_spm(Path(folder) / "spm.model")
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def transformers(folder):
    """The same of transformers."""
    from transformers import DebertaV2Tokenizer
    tokenizer = DebertaV2Tokenizer.from_pretrained(folder)
    return lambda texts: tokenizer(texts)["input_ids"]


def sentencepiece(folder):
    """The same of SentencePiece, without [CLS] and [SEP]."""
    from sentencepiece import SentencePieceProcessor
    return SentencePieceProcessor(model_file=str(Path(folder) / "spm.model")).encode


READERS = {"SentencePiece": sentencepiece, "transformers": transformers, "own": own}


def of_tasks(tasks, data_dir, most=40_000):
    """The first different texts of some tasks' train and dev files."""
    found = {}
    for task in tasks:
        for name in ("train", "dev"):
            for row in glue.load_split(data.TASKS[task], data_dir, name).texts:
                found |= dict.fromkeys(row)
    return list(found)[:most]


def measure(folder, texts, rounds):
    """{name: [(seconds to read the file, seconds for the texts), ...]}, one of each a round.

    Each round reads the file anew, so that no cache knows the texts, and after one that warms up.
    ValueError where more than one text in 10,000 gets other ids than SentencePiece's from us.
    """
    ids = {name: reader(folder)(texts) for name, reader in READERS.items()}
    wrong = sum(a[1:-1] != b for a, b in zip(ids["own"], ids["SentencePiece"]))
    if wrong > len(texts) / 10_000:
        raise ValueError(f"{wrong} of {len(texts)} texts have other ids than SentencePiece's")
    times = {name: [] for name in READERS}
    rng = random.Random(0)
    for _ in range(rounds):
        for name in rng.sample(list(READERS), len(READERS)):
            start = time.perf_counter()
            encode = READERS[name](folder)
            half = time.perf_counter()
            encode(texts)
            times[name].append((half - start, time.perf_counter() - half))
    return times
