"""Fine-tune DeBERTaV3, RoBERTa or BERT on GLUE with LoRA² or a method it is compared with.

    python train.py --task demo                    # nothing to download, under a minute
    python train.py --task rte --k 1               # DeBERTaV3-base and RTE, fetched if missing
    python train.py --task cola --k 8 --model roberta-large --data-dir ~/glue --out runs/cola
    python train.py --resume runs/cola             # go on after a stop, or show the result
    python train.py --eval runs/cola/adapter.safetensors --predict ~/glue/CoLA/test.tsv
    python train.py --train-file mine.tsv --dev-file dev.tsv  # with columns sentence, label
    torchrun --nproc_per_node=2 train.py --task mnli --k 8    # several devices, the same batches
"""
# In this file: o, the options · here, the machine: device, dtype, rank, world · plan, when things
# happen · files, the run folder · signals, Ctrl-C · guard, which remembers the first step that was
# not finite · refusing(), which makes a user's mistake one line. All of them are in running/.
# To change the loss, see task_loss() · the regulariser, regularise() · the schedule, options.plan()
# · the method, methods/baselines.py · what is logged, progress.Log.
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F

import data
import model as models
from formats import fetch, glue
from lora2 import load_lora2_state_dict
from methods import baselines, fast
from methods.first_gradient import start_at_gradient
from running import demo, export, folder, machine, options, progress
from running.errors import Guard, refusing, told

# --- one run ------------------------------------------------------------------------------

def train(o, saved=None):
    """Train to the end, from the start or a saved state: (Machine, task, unseen, model)."""
    with refusing():                                       # around what a user can have wrong
        here = machine.join(o.device, o.dtype)
        task, examples, unseen, net, identity = prepare(o, here)
        plan = options.plan(o, rows=len(examples["train"].labels))
        pruner = baselines.make_pruner(o.method, net, o.target_rank, *plan.pruning(), o.importance,
                                       o.sora_threshold)   # LoRA²: RankPruner
    optimizer, parameters = make_optimizer(net, o.lr, o.head_lr, o.weight_decay, o.outer_lr)
    if o.init == "gradient" and saved is None:             # v and V along W0's first gradient
        in_fp32 = here._replace(dtype="fp32")              # copies of W0 in bf16 have no gradient
        start_at_gradient(net, lambda batch: gradients(net, batch, task, in_fp32, o.accum),
                          stream(examples["train"], o, plan, 0, net, here))
    guard = Guard(here.device, o.out)
    recorded = None if o.eager else fast.recorder(partial(part_loss, net, task, here), net)
    with (folder.RunFolder(identity, here, plan, net, optimizer, pruner, guard) as files,
          machine.Signals(here) as signals, progress.Log(o, plan, here, task, net, guard) as log):
        state = files.begin(o) if saved is None else files.restore(saved)
        log.start(state, examples)
        batches = stream(examples["train"], o, plan, state.step, net, here)
        while True:
            if plan.evaluates(state):
                guard.check()
                scores, predicted = evaluate(net, examples, task, o.batch_size, here, signals.watch)
                files.keep_best(task, scores, predicted)
                log.evaluation(state, scores, predicted)
            if plan.saves(state):
                files.save()
            if plan.is_over(state):
                break
            signals.check(state.step)                      # Ctrl-C: on its way out files saves

            # ---- one training step -------------------------------------------------------
            batch = next(batches)
            state.step += 1
            loss = gradients(net, batch, task, here, o.accum, recorded)  # forward, backward
            R = regularise(o, net, parameters)                       # LoRA²: Eq. 5, its gradients
            update(optimizer, parameters, loss, plan, state.step, o.clip, guard)
            kept = pruner.step() if pruner else None                 # LoRA²: Algorithm 1
            optimizer.zero_grad()
            # ------------------------------------------------------------------------------
            state.tokens += int(batch.attention_mask.sum())
            log.training(state, loss, R, kept, optimizer, pruner)  # a line every ten steps
        files.finish(task, progress.counts(net))
    return here, task, unseen, net


# --- data → model → adapters → optimizer --------------------------------------------------

def prepare(o, here, stored=None):
    """What a user's mistake can break, before anything is written: data, model and adapters.

    stored: what the adapter that is to be evaluated says of itself; None to train.
    Returns (task, {split: Examples}, Examples of --predict or None, model, identity of the run).
    ValueError, TypeError or OSError with one sentence for whatever does not fit.
    """
    folder.check_destinations(o)
    splits, task = load_splits(o, here, stored)
    folder.check_predictions(o, task)
    if o.predict:
        splits["to predict"] = glue.read_split(o.predict, task, labelled=False)
    tokenizer = data.load_tokenizer(o.model)
    examples = {name: data.encode(tokenizer, split, o.max_len, name)
                for name, split in splits.items()}
    if o.task == "own" and here.speaks and not stored:
        print(progress.first_look(examples, task, tokenizer), flush=True)
    torch.manual_seed(o.seed)                              # before head and adapters are drawn
    net = models.from_pretrained(o.model, max(1, len(task.labels)), o.head_dropout, task.labels)
    if o.max_len > net.max_len:
        raise ValueError(f"--max-len {o.max_len}: this model takes {net.max_len} tokens at most")
    identity = folder.identity_of(o, here, task, net, tokenizer)
    if stored:
        folder.check_adapter(stored, identity, o.eval)
    data.check_ids(examples, net.config, o.model)
    unseen = examples.pop("to predict", None)
    identity["rows"] = folder.hash_of_data(examples)

    targets = models.target_modules(net, o.targets) if o.targets else []
    baselines.add_method(o.method, net, targets, net.head, o.k, o.r, o.alpha, o.init)
    machine.seed_dropout(o.seed, here)
    net.to(here.device)
    fast.speed_up(net, here.dtype, o.compile)  # from here on the twins of methods/ compute
    return task, examples, unseen, net, identity


def load_splits(o, here, stored):
    """({split: texts and labels}, task) of a GLUE task or of the user's files.

    A missing task is fetched by one of the processes. To evaluate there is no split "train".
    """
    if o.dev_file and stored:
        splits, task = data.load_dev(o.dev_file, o.task, stored["columns"])
    elif o.dev_file:
        splits, task = data.load_own(o.train_file, o.dev_file)
    else:
        task = data.get_task(o.task)
        if here.speaks and not o.resume and data.is_missing(task, o.data_dir, train=not stored):
            fetch.fetch_task(task, o.data_dir)             # --resume: a file says where data are
        machine.wait_for_all()                             # whatever each finds there by now
        splits = data.load_task(task, o.data_dir, train=not stored)
    limits = {"train": o.limit_train}
    return {name: split.part(0, limits.get(name, o.limit_dev))
            for name, split in splits.items()}, task


def make_optimizer(net, lr, head_lr, weight_decay, outer_lr=None):
    """(AdamW, its parameters): a group for each pair of peak learning rate and weight decay.

    Biases and LayerNorms do not decay; head and outer factors may have learning rates of their own.
    """
    groups = {}                                            # (peak, decay) → parameters
    for name, p in net.named_parameters():
        if p.requires_grad:
            peak = head_lr if models.in_head(name, net.head) else lr
            if outer_lr is not None and name.endswith(baselines.OUTER):
                peak = outer_lr
            decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else weight_decay
            groups.setdefault((peak, decay), []).append(p)
    settings = [{"params": group, "peak": peak, "lr": peak, "weight_decay": decay}
                for (peak, decay), group in groups.items()]
    return torch.optim.AdamW(settings, fused=True), [p for group in groups.values() for p in group]


# --- the parts of a step: the benchmark times these very functions ------------------------

def gradients(net, batch, task, here, accum, recorded=None):
    """Forward and backward over this process's parts of a batch. Returns the loss, a scalar.

    A part's loss is weighted by its share of the rows, so that gradients and loss, summed over
    parts and processes, are those of the mean over the batch. R is the same in each process: it
    is added afterwards, once. recorded: on a GPU a fast.Recorded, which does the same.
    """
    loss = torch.zeros((), device=here.device)
    for part in parts_of(batch, here.rank, here.world, accum):
        part = data.Batch(*here.copies(*part))
        share = len(part.rows) / len(batch.rows)
        if recorded:
            loss += recorded(part, share)
        else:
            loss_of_part = part_loss(net, task, here, part, share)
            loss_of_part.backward()
            loss += loss_of_part.detach()
    machine.sum_gradients(loss, net)                       # one process: nothing to do
    return loss


def part_loss(net, task, here, part, share):
    """The loss of a part of a batch, times its share of the batch's rows: a scalar."""
    return task_loss(predict_batch(net, part, here), part.labels, task) * share


def regularise(o, net, parameters):
    """Add γ R to what the gradients are of. Returns R, a scalar; None for methods without one."""
    R = baselines.regulariser(o.method, net, o.reg_terms)
    if R is None:
        return None
    fast.add_gradients(o.reg * R, parameters)              # as (γ R).backward() does
    return R.detach()


def update(optimizer, parameters, loss, plan, step, max_norm, guard):
    """Clip the gradients to a norm, set the learning rates of this step, AdamW.

    After a first step that is not finite AdamW changes nothing any more: see Guard.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.found_inf = guard.see(loss + norm, step)  # GradScaler's hook in fused AdamW: 1 = skip
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * plan.lr_factor(step)
    optimizer.step()


def predict_batch(net, batch, here):
    """Logits of a batch, (B, num_labels) in fp32."""
    ids, mask, types = here.copies(*batch[:3])
    with (torch.autocast(here.device.type, torch.bfloat16, enabled=here.dtype == "bf16"),
          fast.shared_updates(net)):
        return net(ids, mask, types).float()


def task_loss(logits, labels, task):
    """Cross entropy, or mean squared error of a regression, over the rows: a scalar."""
    if task.labels:
        return F.cross_entropy(logits, labels)
    return F.mse_loss(logits.squeeze(1), labels)


# --- batches ------------------------------------------------------------------------------

def stream(examples, o, plan, step, net, here):
    """Batches without end, from after that step on; epoch e's order is drawn from seed and e."""
    epoch, skip = divmod(step, plan.per_epoch)
    while True:
        order = torch.Generator().manual_seed(o.seed * 1_000_003 + epoch)
        yield from data.batches(examples, o.batch_size, net.config["pad_token_id"], order, skip,
                                here.multiple)
        epoch, skip = epoch + 1, 0


def parts_of(batch, rank, world, accum):
    """This process's share of a batch, in `accum` parts, none of them empty.

    Rows are dealt out in turn: of 5, process 0 of 2 gets rows 0, 2, 4 and process 1 rows 1, 3.
    """
    n = world * accum
    for i in range(rank, min(n, len(batch.rows)), world):
        yield data.Batch(*(tensor[i::n] for tensor in batch))


# --- evaluation ---------------------------------------------------------------------------

@torch.no_grad()
def predict(net, examples, task, batch_size, here, watch):
    """For a split, on the CPU: class ids or scores in the task's unit, (N,); outputs (N, labels).

    Processes share the batches. watch(batches, how many) gives the batches on, and meanwhile
    looks at signals or shows a bar.
    """
    N = len(examples.starts) - 1
    outputs = torch.zeros(N, net.num_labels, device=here.device)
    batches = data.batches(examples, batch_size, net.config["pad_token_id"],
                           multiple=here.multiple)
    net.eval()
    for i, batch in enumerate(watch(batches, math.ceil(N / batch_size))):
        if i % here.world == here.rank:
            [rows] = here.copies(batch.rows)
            outputs[rows] = predict_batch(net, batch, here)
    net.train()
    machine.sum_up([outputs])                              # rows of other processes are 0 here
    if not outputs.isfinite().all():
        raise FloatingPointError("the model's outputs are not finite: try --dtype fp32 or a "
                                 "smaller --lr")
    outputs = outputs.cpu()
    predicted = outputs.argmax(1) if task.labels else outputs.squeeze(1)
    return predicted, outputs


def evaluate(net, examples, task, batch_size, here, watch):
    """({dev split: {metric: value}}, {dev split: predictions (N,)})."""
    scores, predictions = {}, {}
    for name, split in examples.items():
        if name != "train":
            predictions[name], _ = predict(net, split, task, batch_size, here, watch)
            scores[name] = data.metrics(task, predictions[name], split.labels)
    return scores, predictions


# --- from the command line ----------------------------------------------------------------

def train_and_hand_out(o, saved=None):
    """One run, and of its best adapter what is asked for."""
    here, task, unseen, net = train(o, saved)
    if o.predict or o.merge or o.export_peft:
        tensors, _ = folder.load_adapter(f"{o.out}/adapter.safetensors")
        load_lora2_state_dict(net, tensors)
    hand_out(o, here, task, unseen, net)


def evaluate_adapter(given):
    """--eval: show the scores of an adapter, and hand out what is asked for."""
    with refusing():
        tensors, stored = folder.load_adapter(given["eval"])
        o = options.evaluating(stored["settings"], given)
        here = machine.join(o.device, o.dtype)
        task, examples, unseen, net, _ = prepare(o, here, stored)
        load_lora2_state_dict(net, tensors)
    scores, predictions = evaluate(net, examples, task, o.batch_size, here, progress.bar_on(here))
    if here.speaks:
        progress.warn_if_equal(predictions)
        print(progress.rows(examples, task))
        print(progress.scores_text(scores))
    hand_out(o, here, task, unseen, net)


def hand_out(o, here, task, unseen, net):
    """--predict, --merge and --export-peft, of the adapters that the model now holds."""
    predicted, outputs = None, None
    if unseen is not None:
        predicted, outputs = predict(net, unseen, task, o.batch_size, here, progress.bar_on(here))
    if here.speaks:
        export.hand_out(o, o.out, task, net, predicted, outputs)


def act(argv):
    """The demo, --eval, a new run, a finished run or one to go on with: what the words say."""
    given = options.parse(argv, __doc__)
    if given.get("task") == "demo" and not given.keys() & {"model", "resume", "eval"}:
        demo.main(given, train)
    elif "eval" in given:
        evaluate_adapter(given)
    elif "resume" not in given:
        train_and_hand_out(options.resolve(given))
    elif folder.is_finished(given["resume"]):
        result = folder.load_result(given["resume"])
        if wanted := progress.finished(given, result):     # more is asked of its adapter
            evaluate_adapter(wanted)
    else:
        saved = folder.load_run(given["resume"])
        train_and_hand_out(options.resumed(saved["settings"], given), saved)
    machine.leave()


def main(argv=None):
    """The command line; returns the exit status. A user's mistake is one line, a bug is not."""
    return told(act, argv)


if __name__ == "__main__":
    sys.exit(main())
