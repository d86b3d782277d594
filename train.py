"""Fine-tune DeBERTaV3, RoBERTa or BERT on GLUE with LoRA² or one of the methods it is compared with.

    python train.py --task demo                              # nothing to download, under a minute
    python train.py --task rte --k 1                         # DeBERTaV3-base and RTE, fetched if missing
    python train.py --task cola --k 8 --model roberta-large --data-dir ~/glue --out runs/cola
    python train.py --resume runs/cola                       # go on after a stop, or show the result
    python train.py --eval runs/cola/adapter.safetensors --predict ~/glue/CoLA/test.tsv
    python train.py --train-file mine.tsv --dev-file dev.tsv # columns sentence and label, see below
    torchrun --nproc_per_node=2 train.py --task mnli --k 8   # several devices, the same batches
"""
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import baselines
import data
import model as models
import options
import runs
from lora2 import load_lora2_state_dict, lora2_state_dict

LOG_STEPS = 10                                             # between two lines of the log


# --- set-up: everything that a user's mistake can break happens here ----------------------------------------

def set_up(settings, task=None, facts=None):
    """Settings → a run: one namespace with the settings, data, model, adapters. Nothing is written yet.

    task: a data.Task where settings["task"] cannot name it. facts: what an adapter file to be evaluated says.
    Raises ValueError, TypeError or OSError with one sentence.
    """
    run = SimpleNamespace(**settings, settings=settings, step=0, evaluations=[], best=None, pruner=None,
                          budget=None, seconds=0.0, started=time.monotonic())
    run.device = pick_device(run.device)
    run.rank, run.world = runs.join_processes(run.device)
    bf16 = run.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    run.dtype = run.dtype or ("bf16" if bf16 else "fp32")

    splits, run.row = load_splits(run, task)
    labels = run.row.labels                                # () for a regression
    tokenizer = data.load_tokenizer(run.model)
    torch.manual_seed(run.seed)                            # before the head and the adapters are drawn
    run.net = net = models.from_pretrained(run.model, max(1, len(labels)), run.head_dropout)
    run.base = runs.fingerprint(net, net.new_weights)
    if labels:
        net.config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    if tokenizer.get_vocab_size() > net.config["vocab_size"]:
        raise ValueError(f"{run.model}: its tokenizer has {tokenizer.get_vocab_size()} tokens, its embedding "
                         f"{net.config['vocab_size']} rows: they do not belong together")
    if run.max_len > net.max_len:
        raise ValueError(f"--max-len {run.max_len}: this model takes {net.max_len} tokens at most")
    if facts:
        runs.check_facts(run, facts)
    runs.check_destinations(run)
    encode = lambda split: data.encode(tokenizer, split, run.max_len)
    run.data = {name: encode(split) for name, split in splits.items()}
    run.to_predict = encode(data.read_split(run.predict, run.row, labelled=False)) if run.predict else None

    parts = [set(name.split(".")) for name, _ in net.named_parameters()]
    run.head = [part for part in ("pooler", "classifier") if any(part in names for names in parts)]
    run.adapted = baselines.add_method(run.method, net, models.target_modules(net, run.targets or ["q"]),
                                       run.head, run.k, run.r, run.alpha, run.init)
    net.to(run.device)
    run.forward = torch.compile(net) if run.compile else net
    in_head = lambda name: not set(run.head).isdisjoint(name.split("."))
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    run.head_parameters = [(name, p) for name, p in trained if in_head(name)]
    run.body_parameters = [(name, p) for name, p in trained if not in_head(name)]
    return run


def pick_device(name):
    """The torch.device of that name, or the first there is of cuda, mps and cpu."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros((), device=name or found).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} cannot be used here: leave it out or give {found}") from e


def load_splits(run, task):
    """({"train": Split, dev splits}, data.Task) of the task or of the user's own files."""
    if run.train_file:
        task = data.own_task(run.train_file)
        train, dev = (data.read_split(path, task) for path in (run.train_file, run.dev_file))
        return {"train": train.first(run.limit_train), "dev": dev.first(run.limit_dev)}, task
    task = task or data.get_task(run.task)
    if task.downloads and not (Path(run.data_dir) / task.folder).exists():
        data.fetch_task(task, run.data_dir)
    return data.load_task(task, run.data_dir, run.limit_train, run.limit_dev), task


def prepare_training(run):
    """Add to a run what training needs: number of steps, pruner, optimizer."""
    run.steps_per_epoch = math.ceil(len(run.data["train"].labels) / run.batch_size)
    run.T = T = run.max_steps or run.epochs * run.steps_per_epoch
    steps = lambda value: int(value * T) if value < 1 else int(value)   # rounded down, so that their sum stays < T
    run.lr_warmup = steps(run.warmup)
    if run.method in options.PRUNING:
        run.phases = steps(run.prune_warmup), steps(run.prune_final), max(1, steps(run.prune_interval))
        run.budget = len(run.adapted) * run.target_rank
        run.pruner = baselines.make_pruner(run.method, run.net, run.target_rank, T, *run.phases, run.importance)
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


# --- the loop -----------------------------------------------------------------------------------------------

def train(run, log, signals):
    """Train from run.step to the end, evaluating and saving on the way.

    Nothing in a step waits for the device: a non-finite loss or gradient only sets a flag there, with which AdamW
    leaves the weights as they are; it is read before anything is logged or saved.
    """
    bad_step = torch.zeros((), device=run.device)          # the first step with a non-finite loss or gradient
    batches, tokens, started = stream(run), 0, time.monotonic()
    while True:
        if is_due(run) and run.step not in [e["step"] for e in run.evaluations]:
            runs.stop_on(bad_step, run)
            score = evaluate_and_keep(run, log, signals)
            runs.save(run)
            if run.stop_at is not None and score >= run.stop_at:
                break
        elif run.save_steps and run.step and run.step % run.save_steps == 0:
            runs.stop_on(bad_step, run)
            runs.save(run)
        if run.step == run.T:
            break
        signals.check(run)

        batch = next(batches)
        run.step += 1
        tokens += batch.input_ids.numel()
        loss = torch.zeros((), device=run.device)
        for part in micro_batches(batch, run):
            part_loss = task_loss(run, part) * (len(part.rows) / len(batch.rows))
            part_loss.backward()
            loss += part_loss.detach()
        runs.sum_over_processes([loss] + runs.gradients(run.parameters))
        R = baselines.regulariser(run.method, run.net, run.reg_terms)      # LoRA²: Eq. 5, once per optimizer step
        if R is not None:
            (run.reg * R).backward()
        norm = torch.nn.utils.clip_grad_norm_(run.parameters, 0.1 if run.method == "sora" else 1.0)

        bad_step = torch.where((bad_step == 0) & ~torch.isfinite(loss + norm), float(run.step), bad_step)
        run.optimizer.found_inf = (bad_step > 0).float()
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(run.step, run.lr_warmup, run.T)
        run.optimizer.step()
        kept = run.pruner.step() if run.pruner else None                   # LoRA²: Algorithm 1
        run.optimizer.zero_grad()

        if run.step % LOG_STEPS == 0 or run.step in (1, run.T):
            runs.stop_on(bad_step, run)
            log.training(run, loss, R, kept, tokens / (time.monotonic() - started))
    if run.budget is not None and sum(run.pruner.kept().values()) != run.budget:
        raise RuntimeError(f"{sum(run.pruner.kept().values())} singular values are left, not {run.budget}")


def stream(run):
    """Batches without end, from step run.step on; the order in epoch e depends on the seed and e alone."""
    epoch, skip = divmod(run.step, run.steps_per_epoch)
    while True:
        order = torch.Generator().manual_seed(run.seed * 1_000_003 + epoch)
        yield from data.batches(run.data["train"], run.batch_size, run.net.config["pad_token_id"], order, skip)
        epoch, skip = epoch + 1, 0


def micro_batches(batch, run):
    """This process's share of a batch, in run.accum parts, none of them empty."""
    n = run.world * run.accum
    for i in range(run.rank, n, run.world):
        if len(batch.rows) > i:
            yield data.Batch(*(tensor[i::n] for tensor in batch))


def task_loss(run, batch):
    """Cross entropy, or mean squared error for a regression, over the rows of a batch."""
    logits, labels = predict_batch(run, batch), batch.labels.to(run.device, non_blocking=True)
    return F.cross_entropy(logits, labels) if run.row.labels else F.mse_loss(logits.squeeze(1), labels)


def predict_batch(run, batch):
    """Logits of a batch, (B, labels) in fp32."""
    ids, mask, types = (tensor.to(run.device, non_blocking=True) for tensor in batch[:3])
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == "bf16"):
        return run.forward(ids, mask, types).float()


def lr_factor(step, warmup, T):
    """Linear up over `warmup` steps, then linear down to the end; not 0 at any of the steps 1 .. T."""
    return step / warmup if step <= warmup else (T - step + 1) / (T - warmup)


# --- evaluation ---------------------------------------------------------------------------------------------

def is_due(run):
    """Whether an evaluation belongs after step run.step."""
    return run.step > 0 and (run.step % run.steps_per_epoch == 0 or run.step == run.T
                             or bool(run.eval_steps) and run.step % run.eval_steps == 0)


@torch.no_grad()
def predict(run, examples, signals=None):
    """Predictions for a split, (N,): class ids, or scores of a regression. Processes share the batches."""
    outputs = torch.zeros(len(examples.starts) - 1, run.net.num_labels, device=run.device)
    run.net.eval()
    for i, batch in enumerate(data.batches(examples, run.batch_size, run.net.config["pad_token_id"])):
        if signals and run.world == 1:
            signals.check(run)
        if i % run.world == run.rank:
            outputs[batch.rows.to(run.device)] = predict_batch(run, batch)
    run.net.train()
    runs.sum_over_processes([outputs])
    return (outputs.argmax(1) if run.row.labels else outputs.squeeze(1)).cpu()


def evaluate(run, signals=None):
    """({dev split: {metric: value}}, {dev split: predictions})."""
    predictions = {name: predict(run, examples, signals) for name, examples in run.data.items() if name != "train"}
    scores = {name: data.metrics(run.row, p, run.data[name].labels) for name, p in predictions.items()}
    for name, p in predictions.items():
        if len(p) > 1 and (p == p[0]).all() and run.rank == 0:
            print(f"warning: all {len(p)} predictions for {name} are equal: the model may have collapsed; "
                  "a smaller --lr or a longer --warmup may help", file=sys.stderr)
    return scores, predictions


def evaluate_and_keep(run, log, signals):
    """Evaluate after step run.step; write adapter.safetensors if this is the best so far. Returns the score."""
    scores, predictions = evaluate(run, signals)
    evaluation = {"step": run.step, "scores": scores, "score": next(iter(scores.values()))[run.row.metrics[0]]}
    run.evaluations.append(evaluation)
    is_best = run.best is None or evaluation["score"] > run.best["score"]
    if is_best:
        run.best = evaluation
        runs.save_best(run, lora2_state_dict(run.net), predictions)
    log.evaluation(evaluation, is_best)
    return evaluation["score"]


# --- from the command line ----------------------------------------------------------------------------------

def start(given, task=None):
    """Options given → a run ready to go on after run.step, its folder made or found."""
    state = runs.load_state(Path(given["resume"]) / "last.pt") if "resume" in given else None
    run = set_up(runs.resumed_settings(state, given) if state else options.resolve(given), task)
    prepare_training(run)
    if state:
        runs.restore(run, state)
    elif run.rank == 0:
        runs.prepare_folder(run.out, run.overwrite)
    if run.rank == 0:
        runs.announce(run)
    return run


def complete(run):
    """Train a started run to its end and write what belongs there; returns the content of result.json."""
    log = runs.Log(run)
    try:
        with runs.Signals() as signals:
            train(run, log, signals)
    except runs.Stopped:
        runs.save(run)
        raise
    finally:
        log.close()
    return runs.finish(run)


def evaluate_adapter(given):
    """--eval: put an adapter onto its base model, evaluate it, and hand out what was asked for."""
    tensors, facts = runs.load_adapter(given["eval"])
    run = set_up(runs.evaluation_settings(facts, given), facts=facts)
    load_lora2_state_dict(run.net, tensors)
    scores, _ = evaluate(run)
    if run.rank == 0:
        print(runs.show_scores(scores))
    return run


def hand_out(run, adapter):
    """--predict, --export-peft and --merge, with the adapter in that file."""
    if run.predict or run.export_peft or run.merge:
        load_lora2_state_dict(run.net, runs.load_adapter(adapter)[0])
    if run.predict:
        predictions = predict(run, run.to_predict)
        if run.rank == 0:
            path = data.write_submission(Path(adapter).parent, run.row, predictions, Path(run.predict).stem)
            print(f"predictions for {run.predict} are in {path}")
    if run.rank == 0:
        runs.export(run)


def main(argv=None):
    """The command line; returns the exit status. Only set-up turns exceptions into a line: a bug stays a bug."""
    try:
        given = options.parse(argv, __doc__)
        if given.get("task") == "demo" and not given.keys() & {"model", "resume", "eval"}:
            import demo                                    # it uses this module
            demo.main(given)
            return 0
        if "resume" in given and runs.show_finished(given["resume"]):
            return 0
        run = evaluate_adapter(given) if "eval" in given else start(given)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if "eval" not in given:
            complete(run)
        hand_out(run, given.get("eval", Path(run.out) / "adapter.safetensors"))
    except runs.Stopped as stop:
        print(f"stopped at step {run.step} of {run.T}; python train.py --resume {run.out} goes on", file=sys.stderr)
        return 128 + stop.signal
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:                 # a full disk, a --predict file with a bad row
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
