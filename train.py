"""Fine-tune DeBERTaV3, RoBERTa or BERT on GLUE with LoRA² or one of the methods it is compared with.

    python train.py --task demo                              # nothing to download, under a minute
    python train.py --task rte --k 1                         # DeBERTaV3-base and RTE, fetched if missing
    python train.py --task cola --k 8 --model roberta-large --data-dir ~/glue --out runs/cola
    python train.py --resume runs/cola                       # go on after a stop, or show the result
    python train.py --eval runs/cola/adapter.safetensors --predict ~/glue/CoLA/test.tsv
    python train.py --train-file mine.tsv --dev-file dev.tsv # columns sentence, label; see --train-file
    torchrun --nproc_per_node=2 train.py --task mnli --k 8   # several devices, the same batches

The options are in running/options.py; `o` holds all of them. `here` is the machine: device, dtype, rank and
number of processes.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import model as models
from formats import glue
from lora2 import load_lora2_state_dict
from methods import baselines, fast
from running import demo, export, folder, machine, options, progress
from running.errors import refusing, told

# --- data → model → adapters: what a user's mistake can break ends here -------------------------------------

def prepare(o, here, stored=None):
    """(task, {split: Examples}, Examples of --predict or None, model with adapters, identity of the run).

    stored: what the adapter says of itself that is to be evaluated. Nothing is written. ValueError, TypeError
    or OSError with one sentence for whatever a user can have wrong.
    """
    folder.check_destinations(o)
    task, splits = load_splits(o, here, stored)
    tokenizer = data.load_tokenizer(o.model)
    torch.manual_seed(o.seed)                              # before the head and the adapters are drawn
    net = models.from_pretrained(o.model, max(1, len(task.labels)), o.head_dropout)
    if o.max_len > net.max_len:
        raise ValueError(f"--max-len {o.max_len}: this model takes {net.max_len} tokens at most")
    if task.labels:
        net.config["id2label"] = {str(i): label for i, label in enumerate(task.labels)}
    if o.predict:
        splits["to predict"] = glue.read_split(o.predict, task, labelled=False)
    examples = {name: data.encode(tokenizer, split, o.max_len, name) for name, split in splits.items()}
    data.check_ids(examples, net.config, o.model)
    unseen = examples.pop("to predict", None)
    identity = folder.identity_of(o, here, task, net, tokenizer, examples)
    if stored:
        folder.check_adapter(stored, identity, o.eval)
    targets = models.target_modules(net, o.targets or ["q"])
    baselines.add_method(o.method, net, targets, net.head, o.k, o.r, o.alpha, o.init)      # LoRA²: add_lora2
    net.to(here.device)
    fast.speed_up(net, here.dtype, o.compile)              # the same functions in fewer operations
    return task, examples, unseen, net, identity


def load_splits(o, here, stored):
    """(task, {split: texts and labels}) of a GLUE task or of the user's files; no "train" to evaluate."""
    if o.dev_file:
        task, splits = data.load_own(o.task, o.train_file, o.dev_file, stored and stored["columns"])
    else:
        task = data.get_task(o.task)
        if task.downloads:
            if here.speaks and not (Path(o.data_dir) / task.folder).exists():
                glue.fetch_task(task, o.data_dir)
            machine.wait_for_all()                         # all of them, whatever each finds there by now
        splits = data.load_task(task, o.data_dir, training=not stored)
    if stored:
        splits.pop("train", None)
    return task, {name: split.part(0, o.limit_train if name == "train" else o.limit_dev)
                  for name, split in splits.items()}


def make_optimizer(net, lr, head_lr, weight_decay):
    """(AdamW, its parameters): a group for each pair of peak learning rate and weight decay.

    Biases and LayerNorms do not decay; the head may have a learning rate of its own.
    """
    groups = {}                                            # (peak learning rate, weight decay) → parameters
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    named.sort(key=lambda pair: models.in_head(pair[0], net.head))             # the head comes last
    for name, p in named:
        peak = head_lr if models.in_head(name, net.head) else lr
        decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else weight_decay
        groups.setdefault((peak, decay), []).append(p)
    optimizer = torch.optim.AdamW([{"params": group, "peak": peak, "lr": peak, "weight_decay": decay}
                                   for (peak, decay), group in groups.items()], fused=True)
    return optimizer, [p for group in groups.values() for p in group]


def make_pruner(o, net, plan):
    """What prunes after each step: LoRA²'s and AdaLoRA's RankPruner, SoRA's sparse gates, or None."""
    if o.method == "sora":
        return baselines.SparseGates(net, o.sora_threshold)
    if o.method not in options.PRUNING:
        return None
    return baselines.make_pruner(o.method, net, o.target_rank, plan.steps, plan.prune_warmup, plan.prune_final,
                                 plan.prune_interval, o.importance)


# --- one run ------------------------------------------------------------------------------------------------

def train(o, saved=None):
    """Train from the start, or on from the state that folder.load_state() has read, to the end of the plan.

    Returns (Machine, task, Examples of --predict or None, model).
    """
    with refusing():                                       # around what a user can have wrong
        here = machine.join(o.device, o.dtype)
        task, examples, unseen, net, identity = prepare(o, here)
        plan = options.plan(o, rows=len(examples["train"].labels))
        pruner = make_pruner(o, net, plan)
    optimizer, parameters = make_optimizer(net, o.lr, o.head_lr, o.weight_decay)
    machine.seed_dropout(o.seed, here)
    guard = Guard(here.device, o.out)

    with (folder.RunFolder(o.out, identity, here, net, optimizer, pruner, guard) as files,
          machine.Signals(here) as signals, progress.Log(o, plan, here, task, net, guard) as log):
        state = files.begin(o) if saved is None else files.restore(saved)
        log.start(state, examples)
        batches = stream(examples["train"], o, plan, state.step, net, here)
        while True:
            if plan.evaluates(state):
                scores, predictions = evaluate(net, examples, task, o.batch_size, here, signals.watch)
                files.keep_best(task, scores, predictions)
                log.evaluation(state, predictions)
            if plan.saves(state):
                files.save()
            if plan.is_over(state):
                break
            signals.check(state.step)                      # a Ctrl-C ends here: files saves and lets go

            # ---- one training step ---------------------------------------------------------------------
            batch = next(batches)
            state.step += 1
            loss = gradients(net, batch, task, here, o.accum)                  # forward, backward
            R = baselines.regulariser(o.method, net, o.reg_terms)              # LoRA²: Eq. 5, once a step
            if R is not None:
                fast.add_gradients(o.reg * R, parameters)                      # (γ R).backward(), in one go
            update(optimizer, parameters, loss, plan.lr_factor(state.step), o.clip, guard, state.step)
            kept = pruner.step() if pruner else None                           # LoRA²: Algorithm 1
            optimizer.zero_grad()
            # --------------------------------------------------------------------------------------------

            state.tokens += int(batch.attention_mask.sum())
            if log.is_due(state.step):
                log.training(state, loss, R, kept, optimizer.param_groups[0]["lr"])
        files.finish(task, progress.counts(net))
    return here, task, unseen, net


# --- the parts of a step; the benchmark times these very functions ------------------------------------------

def gradients(net, batch, task, here, accum):
    """Forward and backward over this process's parts of a batch. Returns the loss, a scalar, of the whole batch.

    A part's loss is weighted by its rows, so that the gradients, and over all processes their sums, are those
    of the mean over the batch. R is the same in every process: it is added afterwards, once.
    """
    loss = torch.zeros((), device=here.device)
    for part in parts_of(batch, here.rank, here.world, accum):
        [labels] = to_device(here.device, part.labels)
        part_loss = task_loss(predict_batch(net, part, here), labels, task)
        part_loss = part_loss * (len(part.rows) / len(batch.rows))
        part_loss.backward()
        loss += part_loss.detach()
    machine.sum_gradients(loss, net)                       # nothing to do for one process
    return loss


def update(optimizer, parameters, loss, lr_factor, max_norm, guard, step):
    """Clip the gradients to a norm, then AdamW at lr_factor times the peak learning rates.

    If loss or gradients are not finite, weights and moments stay as they are, from this step on.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.found_inf = guard.see(loss + norm, step)     # torch's own signal to fused AdamW: 1, no update
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_factor
    optimizer.step()


class Guard:
    """Remembers, on the device, the first step whose loss or gradients were not finite.

    Nothing in a step waits for the device: see() only sets a flag there; check() reads it before anything is
    logged or written.
    """

    def __init__(self, device, out):
        self.bad_step = torch.zeros((), device=device)     # 0: none
        self.out = out

    def see(self, value, step):
        """1.0 if this value, a scalar, or one before is not finite, else 0.0: a scalar on the device."""
        is_first = (self.bad_step == 0) & ~torch.isfinite(value)
        self.bad_step = torch.where(is_first, float(step), self.bad_step)
        return (self.bad_step > 0).float()

    def check(self):
        """FloatingPointError if there was such a step: the one place where a run waits for the device."""
        if bad_step := int(self.bad_step.item()):
            raise FloatingPointError(
                f"loss or gradient was not finite at step {bad_step}; the last good state is in "
                f"{Path(self.out) / 'last.pt'}: begin again with a smaller --lr, a longer --warmup or "
                "--dtype fp32, and --overwrite")


def predict_batch(net, batch, here):
    """Logits of a batch, (B, labels) in fp32."""
    ids, mask, types = to_device(here.device, *batch[:3])
    with (torch.autocast(here.device.type, torch.bfloat16, enabled=here.dtype == "bf16"),
          fast.shared_updates(net)):
        return net(ids, mask, types).float()


def task_loss(logits, labels, task):
    """Cross entropy, or mean squared error for a regression, over the rows of a batch: a scalar."""
    if task.labels:
        return F.cross_entropy(logits, labels)
    return F.mse_loss(logits.squeeze(1), labels)


def to_device(device, *tensors):
    """Copies. On a GPU the host does not wait for them, which takes pinned memory: without it, as on a Mac,
    the batch could be gone before it is copied."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.contiguous().pin_memory().to(device, non_blocking=True) for tensor in tensors]


# --- batches ------------------------------------------------------------------------------------------------

def stream(examples, o, plan, step, net, here):
    """Batches without end, from that step on; the order in epoch e depends on the seed and e alone."""
    epoch, skip = divmod(step, plan.per_epoch)
    while True:
        order = torch.Generator().manual_seed(o.seed * 1_000_003 + epoch)      # a prime above all epochs
        yield from data.batches(examples, o.batch_size, net.config["pad_token_id"], order, skip,
                                multiple_of(here))
        epoch, skip = epoch + 1, 0


def multiple_of(here):
    """Of how many tokens the width of a batch is a multiple: a GPU's products are faster with 8."""
    return 1 if here.device.type == "cpu" else 8


def parts_of(batch, rank, world, accum):
    """This process's share of a batch, in `accum` parts, none of them empty.

    The rows are dealt out in turn: of 5 rows, process 0 of 2 gets rows 0, 2, 4 and process 1 rows 1, 3.
    """
    n = world * accum
    for i in range(rank, n, world):
        if i < len(batch.rows):
            yield data.Batch(*(tensor[i::n] for tensor in batch))


# --- evaluation ---------------------------------------------------------------------------------------------

@torch.no_grad()
def predict(net, examples, task, batch_size, here, watch):
    """Predictions for a split, (N,): class ids, or scores of a regression. Processes share the batches.

    watch(batches, how many): gives them on, and looks at signals or shows a bar meanwhile.
    """
    rows_of_all = len(examples.starts) - 1
    outputs = torch.zeros(rows_of_all, net.num_labels, device=here.device)
    batches = data.batches(examples, batch_size, net.config["pad_token_id"], multiple=multiple_of(here))
    net.eval()
    for i, batch in enumerate(watch(batches, math.ceil(rows_of_all / batch_size))):
        if i % here.world == here.rank:
            [rows] = to_device(here.device, batch.rows)
            outputs[rows] = predict_batch(net, batch, here)
    net.train()
    machine.sum_up([outputs])
    if not outputs.isfinite().all():
        raise FloatingPointError("the model's outputs are not finite: try --dtype fp32 or a smaller --lr")
    return (outputs.argmax(1) if task.labels else outputs.squeeze(1)).cpu()


def evaluate(net, examples, task, batch_size, here, watch):
    """({dev split: {metric: value}}, {dev split: predictions (N,)}) of the dev splits among the examples."""
    scores, predictions = {}, {}
    for name, split in examples.items():
        if name != "train":
            predictions[name] = predict(net, split, task, batch_size, here, watch)
            scores[name] = data.metrics(task, predictions[name], split.labels)
    return scores, predictions


# --- from the command line ----------------------------------------------------------------------------------

def evaluate_adapter(given):
    """--eval: load an adapter instead of training one, show its scores, and hand out what is asked for."""
    with refusing():
        tensors, stored = folder.load_adapter(given["eval"])
        o = options.evaluating(stored["settings"], given)
        here = machine.join(o.device, o.dtype)
        task, examples, unseen, net, _ = prepare(o, here, stored)
        load_lora2_state_dict(net, tensors)
    scores, predictions = evaluate(net, examples, task, o.batch_size, here, progress.bar_on(here))
    if here.speaks:
        progress.warn_if_equal(predictions, set())
        print(f"{progress.rows(examples, task)}\n{progress.scores(scores)}")
    hand_out(o, here, task, unseen, net, Path(o.eval).parent)


def train_and_hand_out(o, saved=None):
    """One run, and of its best adapter what is asked for."""
    here, task, unseen, net = train(o, saved)
    if o.predict or o.merge or o.export_peft:
        tensors, _ = folder.load_adapter(Path(o.out) / "adapter.safetensors")
        load_lora2_state_dict(net, tensors)
    hand_out(o, here, task, unseen, net, o.out)


def hand_out(o, here, task, unseen, net, out):
    """--predict, --merge and --export-peft, of the adapters that the model now holds."""
    predictions = None
    if unseen is not None:
        predictions = predict(net, unseen, task, o.batch_size, here, progress.bar_on(here))
    if here.speaks:
        export.hand_out(o, out, task, net, predictions)


def act(argv):
    """Do what the words of the command line say."""
    given = options.parse(argv, __doc__)
    if given.get("task") == "demo" and not given.keys() & {"model", "resume", "eval"}:
        demo.main(given, train)
    elif "eval" in given:
        evaluate_adapter(given)
    elif "resume" not in given:
        train_and_hand_out(options.resolve(given))
    elif (Path(given["resume"]) / "result.json").exists():
        if more := progress.finished(given):               # something else is asked of its adapter
            evaluate_adapter(more)
    else:
        with refusing():
            saved = folder.load_state(given["resume"])
        train_and_hand_out(options.resumed(saved["settings"], given), saved)
    machine.leave()


def main(argv=None):
    """The command line; returns the exit status. A user's mistake is one line, a bug keeps its traceback."""
    return told(act, argv)


if __name__ == "__main__":
    sys.exit(main())
