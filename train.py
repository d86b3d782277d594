"""Fine-tune DeBERTaV3, RoBERTa or BERT on GLUE with LoRA² or one of the methods it is compared with.

    python train.py --task demo                              # nothing to download, under a minute
    python train.py --task rte --k 1                         # DeBERTaV3-base and RTE, fetched if missing
    python train.py --task cola --k 8 --model roberta-large --data-dir ~/glue --out runs/cola
    python train.py --resume runs/cola                       # go on after a stop, or show the result
    python train.py --eval runs/cola/adapter.safetensors --predict ~/glue/CoLA/test.tsv
    python train.py --train-file mine.tsv --dev-file dev.tsv # columns sentence, label; see --train-file
    torchrun --nproc_per_node=2 train.py --task mnli --k 8   # several devices, the same batches
"""
import contextlib
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from methods import baselines
import data
from formats import disk
from methods import fast
import model as models
from running import options
from running import machine as processes
from running import folder as runs
from running import progress as show
from formats import glue as tasks
from lora2 import load_lora2_state_dict

# --- set-up: everything that a user's mistake can break happens here ----------------------------------------

def set_up(settings, facts=None):
    """Settings → a run: one namespace with the settings, data, model and adapters. Nothing is written.

    facts: of the adapter that is to be evaluated. ValueError, TypeError or OSError with one sentence for
    whatever a user can have wrong.
    """
    run = SimpleNamespace(**settings, step=0, evaluations=[], best=None, pruner=None, budget=None,
                          seconds=0.0, started=time.monotonic(), warned=set())
    run.device, run.rank, run.world = processes.join(run.device)
    if run.device.type == "cpu":
        processes.keep_freed_memory()
    slow = processes.emulates_bf16(run.device.type)
    run.dtype = run.dtype or ("bf16" if run.device.type == "cuda" and not slow else "fp32")
    if slow and run.dtype == "bf16" and run.rank == 0:
        print(f"warning: this {run.device.type} has no bf16 arithmetic and imitates it, up to 100 times "
              "slower: give --dtype fp32", file=sys.stderr)
    run.settings = settings | {"dtype": run.dtype}

    splits, run.row = load_splits(run, facts)
    labels = run.row.labels                                # () for a regression
    tokenizer = data.load_tokenizer(run.model)
    torch.manual_seed(run.seed)                            # before the head and the adapters are drawn
    run.net = net = models.from_pretrained(run.model, max(1, len(labels)), run.head_dropout)
    run.base = runs.fingerprint(net, tokenizer)
    if facts:
        runs.check_facts(run, facts)
    if run.max_len > net.max_len:
        raise ValueError(f"--max-len {run.max_len}: this model takes {net.max_len} tokens at most")
    run.pad = net.config["pad_token_id"]
    if labels:
        net.config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    if run.predict:
        splits["to predict"] = tasks.read_split(run.predict, run.row, labelled=False)
    run.data = {name: data.encode(tokenizer, split, run.max_len, name) for name, split in splits.items()}
    check_ids(run)
    run.to_predict = run.data.pop("to predict", None)
    run.rows = runs.digest(*(part for name, examples in run.data.items() for part in (name, *examples[:4])))

    parts = {part for name, _ in net.named_parameters() for part in name.split(".")}
    run.head = [part for part in ("pooler", "classifier") if part in parts]
    run.adapted = baselines.add_method(run.method, net, models.target_modules(net, run.targets or ["q"]),
                                       run.head, run.k, run.r, run.alpha, run.init)
    in_head = lambda name: not set(run.head).isdisjoint(name.split("."))
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    run.head_parameters = [(name, p) for name, p in trained if in_head(name)]
    run.body_parameters = [(name, p) for name, p in trained if not in_head(name)]
    net.to(run.device)
    run.forward = fast.speed_up(net, run.dtype, run.compile)
    run.multiple = 1 if run.device.type == "cpu" and not run.compile else 8    # of tokens in a batch's rows
    return run


def check_ids(run):
    """ValueError unless the tokenizer belongs to the model: a GPU would end in an assertion of its own."""
    ids, types = (max(int(getattr(examples, field).max()) for examples in run.data.values())
                  for field in ("ids", "types"))
    sizes = run.net.config["vocab_size"], max(2, run.net.config["type_vocab_size"])        # one type: ignored
    if ids >= sizes[0] or types >= sizes[1]:
        raise ValueError(f"{run.model}: its tokenizer gives ids up to {ids} and types up to {types}, its "
                         f"model has {sizes[0]} and {sizes[1]} of them: they do not belong together")


def load_splits(run, facts):
    """({"train": Split, dev splits}, tasks.Task) of a task or of the user's files; no "train" to evaluate."""
    if run.dev_file:
        task = tasks.get_task(run.task)._replace(header=()) if run.task != "own" else tasks.Task(
            "", {}, **facts["columns"]) if facts else tasks.own_task(run.train_file)
        files = ("train", run.train_file), ("dev", run.dev_file)
        splits = {name: tasks.read_split(path, task) for name, path in files if path}
    else:
        task = tasks.get_task(run.task)
        if task.downloads:
            if run.rank == 0 and not (Path(run.data_dir) / task.folder).exists():
                tasks.fetch_task(task, run.data_dir)
            processes.wait_for_all()                       # all of them, whatever each finds there by now
        if facts and not task.make:                        # to evaluate, train.tsv need not be there
            task = task._replace(rows={name: n for name, n in task.rows.items() if name != "train"})
        splits = data.load_task(task, run.data_dir)
    return {name: split.part(0, run.limit_train if name == "train" else run.limit_dev)
            for name, split in splits.items() if not (facts and name == "train")}, task


def prepare_training(run):
    """Add to a run what training needs: number of steps, pruner, optimizer."""
    run.steps_per_epoch = math.ceil(len(run.data["train"].labels) / run.batch_size)
    run.T = run.max_steps or run.epochs * run.steps_per_epoch
    run.lr_warmup, *run.phases = options.schedule(run.settings, run.T)
    if run.method in options.PRUNING:
        run.budget = len(run.adapted) * run.target_rank
        run.pruner = baselines.make_pruner(run.method, run.net, run.target_rank, run.T, *run.phases,
                                           run.importance)
    elif run.method == "sora":
        run.pruner = baselines.SparseGates(run.net, run.sora_threshold)
    run.floor = baselines.regulariser_floor(run.method, run.k, run.r, run.reg_terms)

    groups = {}                                            # (peak learning rate, weight decay) → parameters
    for named, lr in ((run.body_parameters, run.lr), (run.head_parameters, run.head_lr)):
        for name, parameter in named:
            decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else run.weight_decay
            groups.setdefault((lr, decay), []).append(parameter)
    run.parameters = [p for group in groups.values() for p in group]
    run.optimizer = torch.optim.AdamW([{"params": group, "peak": lr, "lr": lr, "weight_decay": decay}
                                       for (lr, decay), group in groups.items()], fused=True)
    run.bad_step = torch.zeros((), device=run.device)      # the first step with a non-finite loss or gradient
    if run.rank > 0:
        torch.manual_seed(run.seed + run.rank)             # another dropout mask in each process


# --- the loop -----------------------------------------------------------------------------------------------

def train(run, log, signals):
    """Train from run.step to the end, evaluating and saving on the way.

    Nothing in a step waits for the device: a non-finite loss or gradient only sets a flag there, by which
    AdamW leaves weights and moments as they are; check_finite reads it before anything is logged or saved.
    """
    batches, tokens = stream(run), 0
    while True:
        if is_due(run):
            evaluate_and_keep(run, log, signals)
            runs.save(run)
        elif run.save_steps and run.step % run.save_steps == 0:
            runs.save(run)
        reached = run.stop_at is not None and run.evaluations and run.evaluations[-1]["score"] >= run.stop_at
        if run.step == run.T or reached:
            break
        signals.check(run)

        batch = next(batches)
        run.step += 1
        tokens += int(batch.attention_mask.sum())
        loss = torch.zeros((), device=run.device)
        for part in micro_batches(batch, run):
            part_loss = task_loss(run, part) * (len(part.rows) / len(batch.rows))
            part_loss.backward()
            loss += part_loss.detach()
        processes.sum_up([loss] + processes.gradients(run.parameters))
        R = baselines.regulariser(run.method, run.net, run.reg_terms)  # LoRA²: Eq. 5, once per optimizer step
        if R is not None:
            fast.add_gradients(run.reg * R, run.parameters)
        most = 0.1 if run.method == "sora" else 1.0        # as the authors' scripts of either have it
        norm = torch.nn.utils.clip_grad_norm_(run.parameters, most)

        is_bad = (run.bad_step == 0) & ~torch.isfinite(loss + norm)
        run.bad_step = torch.where(is_bad, float(run.step), run.bad_step)
        run.optimizer.found_inf = (run.bad_step > 0).float()           # if 1, fused AdamW changes nothing
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(run.step, run.lr_warmup, run.T)
        run.optimizer.step()
        kept = run.pruner.step() if run.pruner else None               # LoRA²: Algorithm 1
        run.optimizer.zero_grad()

        if run.step % show.LOG_STEPS == 0 or run.step in (1, run.T):
            runs.check_finite(run)
            log.training(run, loss, R, kept, tokens)
    assert run.budget is None or run.budget == sum(run.pruner.kept().values()), run.pruner.kept()


def stream(run):
    """Batches without end, from step run.step on; the order in epoch e depends on the seed and e alone."""
    epoch, skip = divmod(run.step, run.steps_per_epoch)
    while True:
        order = torch.Generator().manual_seed(run.seed * 1_000_003 + epoch)
        yield from data.batches(run.data["train"], run.batch_size, run.pad, order, skip, run.multiple)
        epoch, skip = epoch + 1, 0


def micro_batches(batch, run):
    """This process's share of a batch, in run.accum parts, none of them empty."""
    n = run.world * run.accum
    for i in range(run.rank, n, run.world):
        if len(batch.rows) > i:
            yield data.Batch(*(tensor[i::n] for tensor in batch))


def task_loss(run, batch):
    """Cross entropy, or mean squared error for a regression, over the rows of a batch."""
    logits, [labels] = predict_batch(run, batch), to_device(run, batch.labels)
    return F.cross_entropy(logits, labels) if run.row.labels else F.mse_loss(logits.squeeze(1), labels)


def predict_batch(run, batch):
    """Logits of a batch, (B, labels) in fp32."""
    ids, mask, types = to_device(run, *batch[:3])
    with (torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == "bf16"),
          fast.shared_updates(run.net)):
        return run.forward(ids, mask, types).float()


def to_device(run, *tensors):
    """Copies. On a GPU the host does not wait for them, which takes pinned memory: without it, as on a Mac,
    the batch could be gone before it is copied."""
    if run.device.type != "cuda":
        return [tensor.to(run.device) for tensor in tensors]
    return [tensor.contiguous().pin_memory().to(run.device, non_blocking=True) for tensor in tensors]


def lr_factor(step, warmup, T):
    """Linear up over `warmup` steps, then linear down to the end; not 0 at any of the steps 1 .. T."""
    return step / warmup if step <= warmup else (T - step + 1) / (T - warmup)


# --- evaluation ---------------------------------------------------------------------------------------------

def is_due(run):
    """Whether an evaluation belongs after step run.step and has not been made."""
    last = run.evaluations[-1]["step"] if run.evaluations else 0
    return run.step > last and (run.step == run.T or run.step % run.steps_per_epoch == 0
                                or run.eval_steps and run.step % run.eval_steps == 0)


@torch.no_grad()
def predict(run, examples, signals=None):
    """Predictions for a split, (N,): class ids, or scores of a regression. Processes share the batches."""
    outputs = torch.zeros(len(examples.starts) - 1, run.net.num_labels, device=run.device)
    run.net.eval()
    batches = data.batches(examples, run.batch_size, run.pad, multiple=run.multiple)
    for i, batch in enumerate(batches if signals else show.bar_of(batches, run, examples)):
        if signals and (run.world == 1 or i % 10 == 0):
            signals.check(run, all_are_here=True)
        if i % run.world == run.rank:
            logits, [rows] = predict_batch(run, batch), to_device(run, batch.rows)
            outputs[rows] = logits
    run.net.train()
    processes.sum_up([outputs])
    if not outputs.isfinite().all():
        raise FloatingPointError(f"after step {run.step} the model's outputs are not finite: try --dtype "
                                 "fp32 or a smaller --lr")
    return (outputs.argmax(1) if run.row.labels else outputs.squeeze(1)).cpu()


def evaluate(run, signals=None):
    """({dev split: {metric: value}}, {dev split: predictions})."""
    predictions = {name: predict(run, examples, signals) for name, examples in run.data.items()
                   if name != "train"}
    show.warn_if_equal(run, predictions)
    scores = {name: data.metrics(run.row, predicted, run.data[name].labels)
              for name, predicted in predictions.items()}
    return scores, predictions


def evaluate_and_keep(run, log, signals):
    """Evaluate after step run.step; write adapter.safetensors if nothing before was better."""
    runs.check_finite(run)
    scores, predictions = evaluate(run, signals)
    score = next(iter(scores.values()))[run.row.metrics[0]]
    evaluation = {"step": run.step, "scores": scores, "score": score}
    if run.budget is not None:
        evaluation["kept"] = sum(run.pruner.kept().values())
    run.evaluations.append(evaluation)
    if run.best is None or score >= run.best["score"]:     # of equals the later one, which is pruned more
        run.best = evaluation
        runs.save_best(run, predictions)
    log.evaluation(run, evaluation)


# --- from the command line ----------------------------------------------------------------------------------

def start(given):
    """Options given → a run: new, resumed, or with the adapter of --eval. --resume finds it from here on."""
    with runs.refusing(), contextlib.ExitStack() as held:
        tensors = state = facts = None
        if "eval" in given:
            tensors, facts = runs.load_adapter(given["eval"])
            settings = options.evaluate(facts["settings"], given)
        elif "resume" in given:
            state = runs.load_state(given["resume"])
            settings = options.resume(state["settings"], given)
        else:
            settings = options.resolve(given)
        runs.check_destinations(settings, resumed=bool(state))
        run = set_up(settings, facts)
        if tensors:
            load_lora2_state_dict(run.net, tensors)
            return run
        prepare_training(run)
        if run.rank == 0:                                  # two runs in one folder would mix up their files
            held.enter_context(disk.alone(run.out, "train.py"))
            runs.check_destinations(settings, resumed=bool(state))         # another may just have ended
        if state:
            runs.restore(run, state)
        else:
            runs.prepare_folder(run)
            runs.save(run)
        run.release_folder = held.pop_all().close
    show.announce(run)
    return run


def complete(run):
    """Train a started run to its end and write what belongs there; returns the content of result.json."""
    log = show.Log(run)
    try:
        with processes.Signals() as signals:
            train(run, log, signals)
        return show.finish(run)
    except processes.Stopped:
        runs.save(run)
        raise
    finally:
        log.close()
        run.release_folder()


def act(given):
    """Do what the options say: the demo, an evaluation, or a run from its start or from where it stopped."""
    if given.get("task") == "demo" and not given.keys() & {"model", "resume", "eval"}:
        from running import demo                                        # it uses this module
        return demo.main(given)
    if "resume" in given and (Path(given["resume"]) / "result.json").exists():
        with runs.refusing():
            given = show.finished(given)
        if not given:                                      # nothing more is asked of its adapter
            return
    run = start(given)
    if run.eval:
        scores, _ = evaluate(run)
        if run.rank == 0:
            print(f"{show.rows(run)}\n{show.scores(scores)}")
    else:
        complete(run)
        if run.predict or run.merge or run.export_peft:
            load_lora2_state_dict(run.net, runs.load_adapter(Path(run.out) / "adapter.safetensors")[0])
    predictions = predict(run, run.to_predict) if run.predict else None
    if run.rank == 0:
        runs.hand_out(run, predictions)


def main(argv=None):
    """The command line; returns the exit status. A user's mistake is one line, a bug keeps its traceback."""
    for stream in filter(lambda stream: hasattr(stream, "reconfigure"), (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")               # no run shall end for a Λ that a console lacks
    try:
        with runs.refusing():
            given = options.parse(argv, __doc__)
        act(given)
        processes.leave()
        return 0
    except runs.Refused as error:
        text, status = f"error: {error}", 2
    except RuntimeError as error:
        if "out of memory" not in str(error):              # CUDA's has a class of its own, a Mac's has not
            raise
        text, status = ("error: the GPU's memory is full: begin again with --overwrite and --accum 2, "
                        "the same result with less; to evaluate give a smaller --batch-size"), 1
    except (FloatingPointError, OSError) as error:         # diverged; a full disk, a lost process
        text, status = f"error: {error}", 1
    except processes.Stopped as stop:
        text, status = str(stop), stop.status
    except KeyboardInterrupt:
        text, status = "stopped: what was written before is whole", 130
    print(text, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
