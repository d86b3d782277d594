"""What a run reads: the rows of its task, or of a user's own files, as numbers."""
import os

import data
from formats import fetch, glue
from running import machine, progress, saving
from running.options import flag


def load_examples(o, here, stored):
    """(task, {split: Examples}, tokenizer), with a split "to predict" if --predict is given."""
    splits, task = load_splits(o, here, stored)
    mean, deviation = task.unit
    if (o.merge or o.export_peft) and abs(mean) > 1e5 * deviation:
        raise ValueError(f"--merge and --export-peft make a model that gives scores itself, and in "
                         f"fp32 those around {mean:g} would be all alike: subtract {mean:g}")
    if o.predict:
        check_file(o, "predict")                           # which may just have been fetched
        saving.check_predictions(o, task)
        splits["to predict"] = glue.read_split(o.predict, task, labelled=False)
    tokenizer = data.load_tokenizer(o.model)
    examples = {name: data.encode(tokenizer, split, o.max_len, name)
                for name, split in splits.items()}
    if here.is_main and examples:
        progress.first_look(examples, task, tokenizer)
    return task, examples, tokenizer


def check_file(o, name):
    """ValueError that names an option whose file is not there."""
    path = getattr(o, name)
    if path and not os.path.exists(path):
        raise ValueError(f"{flag(name)} {path}: there is no such file: give its path")


def load_splits(o, here, stored):
    """({split: texts and labels}, task) of a GLUE task or of the user's files.

    A missing task is fetched by one of the processes. To evaluate there is no split "train", and
    to predict alone, with an adapter of own data, none at all.
    """
    check_file(o, "train_file")
    check_file(o, "dev_file")
    if os.path.isfile(o.data_dir):
        raise ValueError(f"--data-dir {o.data_dir} is a file: give the folder that holds RTE/, "
                         "CoLA/ and so on")
    if stored and (o.dev_file or o.task == "own"):
        is_own = o.task == "own" and stored["columns"]
        task = data.Task("", {}, **stored["columns"]) if is_own else data.get_task(o.task)
        splits = {"dev": data.load_file(o.dev_file, task)} if o.dev_file else {}
    elif o.dev_file:
        splits, task = data.load_own(o.train_file, o.dev_file)
    else:
        task = data.get_task(o.task)
        if here.is_main and not o.resume and glue.is_missing(task, o.data_dir, train=not stored):
            fetch_data(task, o.data_dir)                   # --resume: a file says where data are
        machine.wait_for_all()                             # whatever each finds there by now
        splits = data.load_task(task, o.data_dir, train=not stored)
    limits = {"train": o.limit_train}
    return {name: split.part(0, limits.get(name, o.limit_dev))
            for name, split in splits.items()}, task


def fetch_data(task, data_dir):
    """Fetch a task's files into the data folder."""
    try:
        fetch.fetch_task(task, data_dir)
    except (OSError, ValueError) as error:
        raise OSError(f"--data-dir {data_dir} does not hold {task.folder}/: {error}") from None


def check_ids(examples, config, name):
    """ValueError unless {split: Examples} fit a model: on a GPU the error would name no cause."""
    highest_id = max((int(split.ids.max()) for split in examples.values()), default=0)
    highest_type = max((int(split.types.max()) for split in examples.values()), default=0)
    ids = config["vocab_size"]
    types = max(2, config["type_vocab_size"])           # models with 0 or 1 ignore them
    if highest_id >= ids or highest_type >= types:
        raise ValueError(f"{name}: its tokenizer gives ids up to {highest_id} and types up to "
                         f"{highest_type}, its model has {ids} and {types} of them: they do not "
                         "belong together")
