"""Fine-tune DeBERTaV3, RoBERTa or BERT on GLUE with LoRA² (arXiv 2408.06854) or another method.

    python train.py --task demo                    # nothing to download, under a minute
    python train.py --task rte --k 1               # DeBERTaV3-base and RTE, fetched if missing
    python train.py --task cola --k 8 --model roberta-large --data-dir ~/glue --out runs/cola
    python train.py --resume runs/cola             # go on after a stop, or show the result
    python train.py --eval runs/cola/adapter.safetensors --predict ~/glue/CoLA/test.tsv
    python train.py --train-file mine.tsv --dev-file dev.tsv  # with columns sentence, label
    torchrun --nproc_per_node=2 train.py --task mnli --k 8    # several devices, the same batches
"""
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F

import data
import model
from lora2 import load_lora2_state_dict
from methods import by_name, fast
from running import demo, export, folder, inputs, machine, options, progress, saving, schedule
from running.errors import FiniteCheck, exit_status, user_errors

# --- one run: data → model → adapters → optimizer → loop → result --------------------------
# o       the options, argparse's Namespace
# here    this process: device, dtype, rank, world
# unseen  the rows of --predict
# plan    when to evaluate, save, prune and stop
# pruner  what prunes; None if the method does not
# state   the step, the tokens, the evaluations and the best of them so far
# finite  notices NaN, without waiting for the GPU

def train(o, saved=None):
    """One run. saved: what the last.pt of a stopped run holds, if it is to go on."""
    with user_errors():                                    # a user's mistake: one line, status 2
        here = machine.join(o.device, o.dtype)
        task, examples, unseen, net, identity = prepare(o, here)
        plan = schedule.plan(o, rows=len(examples["train"].labels))
        pruner = by_name.make_pruner(o.method, net, o.target_rank, o.importance,
                                     o.sora_threshold, **plan.pruning())     # T, t_i, t_f, ΔT
    optimizer, parameters = make_optimizer(net, o.lr, o.head_lr, o.weight_decay, o.outer_lr)
    loss_of = partial(part_loss, net, here)                # of a part of a batch
    R_of = by_name.regulariser(o.method, net, o.reg_terms)  # LoRA²: Eq. 5; None if there is none
    differentiate = fast.make_differentiate(net, parameters, o.eager)
    state, finite = schedule.State(), FiniteCheck(here.device, o.out)
    snapshot = partial(saving.snapshot, state, net, optimizer, pruner, finite, here)  # for last.pt
    with (saving.RunFolder(identity, plan, here, snapshot) as run_folder,
          machine.Signals(here) as signals, progress.Log(o, plan, here, task, net, finite) as log):
        if saved:
            run_folder.restore(saved, state, net, optimizer, pruner)
        else:
            run_folder.begin(o)
        log.start(state, examples)
        batches = endless_batches(examples["train"], o, plan, state.step, net, here)
        while True:
            if plan.evaluates(state):                      # at the top: --resume may owe one
                finite.check()
                scores, predictions = evaluate(net, examples, task, o.batch_size, here, signals)
                run_folder.note_evaluation(state, net, pruner, task, scores, predictions)
                log.evaluation(state, scores, predictions)
            if plan.saves(state):
                run_folder.save()
            if plan.is_over(state):
                break
            signals.check(state.step)                      # Ctrl-C: stop here, and save
            # ---- one training step -------------------------------------------------------
            batch = next(batches)                # ids, mask, types (B, T); labels, rows (B,)
            state.count(batch)                   # one more step, and its tokens
            loss = forward_backward(loss_of, batch, here, o.accum, differentiate)
            R = differentiate(R_of, weight=o.reg) if R_of else None  # adds γ ∇R, γ = o.reg
            update(optimizer, parameters, loss, plan, state.step, o.clip, finite)
            kept = pruner.step() if pruner else None       # LoRA²: Algorithm 1
            optimizer.zero_grad()
            # ------------------------------------------------------------------------------
            log.training(state, loss, R, kept, optimizer, pruner)    # a line every ten steps
        run_folder.finish(state, net, pruner, task)
    write_outputs(o, here, task, unseen, net, f"{o.out}/adapter.safetensors")  # of the best step


# --- data → model → adapters → optimizer --------------------------------------------------

def prepare(o, here, stored=None):
    """Data, model and adapters. stored: what an adapter to evaluate says of itself; None to train.

    Returns (task, {split: Examples}, Examples of --predict or None, model, identity: what a stored
    run or adapter has to agree with). A user's mistakes are refused before anything is written.
    """
    saving.check_destinations(o)
    task, examples, tokenizer = inputs.load_examples(o, here, stored)
    torch.manual_seed(o.seed)                              # before head and adapters are drawn
    outputs = len(task.labels) or 1                        # a score has no labels
    net = model.from_pretrained(o.model, outputs, o.head_dropout, task.labels)
    if o.max_len > net.max_len:
        raise ValueError(f"--max-len {o.max_len}: this model takes {net.max_len} tokens at most")
    inputs.check_ids(examples, net.config, o.model)
    unseen = examples.pop("to predict", None)              # checked, but no part of the run
    identity = folder.identity_of(o, here, task, net, tokenizer, examples)
    if stored:
        folder.check_adapter(stored, identity, o.eval)

    targets = model.target_modules(net, o.targets) if o.targets else []    # BitFit has none
    by_name.add_method(o.method, net, targets, net.head_parts, o.k, o.r, o.alpha, o.init)
    if here.rank > 0:
        torch.manual_seed(o.seed + here.rank)              # each process: other dropout masks
    net.to(here.device)
    fast.speed_up(net, here.dtype, o.compile)              # the same results, faster
    return task, examples, unseen, net, identity


def make_optimizer(net, lr, head_lr, weight_decay, outer_lr=None):
    """(AdamW, its parameters): a group for each pair of peak learning rate and weight decay.

    Biases and LayerNorms do not decay; head and outer factors may have learning rates of their own.
    """
    groups = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            peak = head_lr if model.in_head(name, net.head_parts) else lr
            if outer_lr is not None and name.endswith(by_name.OUTER):
                peak = outer_lr
            decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else weight_decay
            empty = {"params": [], "peak": peak, "lr": peak, "weight_decay": decay}
            groups.setdefault((peak, decay), empty)["params"].append(p)
    parameters = [p for group in groups.values() for p in group["params"]]
    return torch.optim.AdamW(list(groups.values()), fused=True), parameters


def endless_batches(examples, o, plan, step, net, here):
    """The batches after `step` steps, without end; epoch e is shuffled by the seed and e."""
    epoch, skip = divmod(step, plan.per_epoch)
    while True:
        order = torch.Generator().manual_seed(o.seed * 1_000_003 + epoch)
        yield from data.batches(examples, o.batch_size, net.config["pad_token_id"], order, skip,
                                here.multiple)
        epoch, skip = epoch + 1, 0


# --- the parts of a step: the benchmark times these very functions ------------------------

def forward_backward(loss_of, batch, here, accum, differentiate):
    """The mean loss over a batch, a scalar. Its gradients are added to those of the parameters.

    The batch is cut into n = world · accum parts. Part i has the rows i, i + n, i + 2n, ..., and
    process p has the parts p, p + world, ... A part counts by its share of the rows. R, the same in
    each process, is not in it: it is added after the sum over the processes.

    loss_of: part_loss(), given net and here. differentiate(f, *inputs, weight=w) returns f(*inputs)
    and adds w times its gradients; on a GPU it replays what it recorded (methods/fast.py).
    """
    loss = torch.zeros((), device=here.device)
    n = here.world * accum
    for i in range(here.rank, min(n, len(batch.rows)), here.world):        # none that is empty
        part = here.copies(*(tensor[i::n] for tensor in batch))
        share = len(part[0]) / len(batch.rows)
        loss += share * differentiate(loss_of, *part, weight=share)
    machine.sum_gradients(loss, differentiate.parameters)  # one process: nothing to do
    return loss


def part_loss(net, here, *tensors):
    """The mean loss over a part of a batch, given as the tensors of a Batch: a scalar."""
    part = data.Batch(*tensors)
    return task_loss(predict_batch(net, part, here), part.labels)


def predict_batch(net, batch, here):
    """Logits of a batch, (B, num_labels) in fp32."""
    ids, mask, types = here.copies(*batch[:3])
    with (torch.autocast(here.device.type, torch.bfloat16, enabled=here.dtype == "bf16"),
          fast.shared_updates(net)):                       # core() @ V of all adapters at once
        return net(ids, mask, types).float()


def task_loss(logits, labels):
    """The mean over the rows of cross entropy, or of a score's squared error: a scalar."""
    if logits.shape[1] > 1:
        return F.cross_entropy(logits, labels)
    return F.mse_loss(logits.squeeze(1), labels)


def update(optimizer, parameters, loss, plan, step, max_norm, finite):
    """Clip the gradients to a norm, set this step's learning rates, AdamW: no step after a NaN.

    A fused AdamW whose found_inf is 1 skips its steps, as with a GradScaler. Nothing here waits for
    the device: finite.check() raises later.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.found_inf = finite.note(loss + norm, step)   # from the first NaN on 1.0, else 0.0
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * plan.lr_factor(step)
    optimizer.step()


# --- evaluation ---------------------------------------------------------------------------

@torch.no_grad()
def predict(net, examples, batch_size, here, signals=None):
    """(predictions (N,), outputs (N, num_labels)) of a split, tensors on the CPU.

    Predictions are class ids, or scores in the task's unit. Processes share the batches. signals:
    what raises Stopped after a Ctrl-C.
    """
    N = len(examples.starts) - 1
    outputs = torch.zeros(N, net.num_labels, device=here.device)
    batches = data.batches(examples, batch_size, net.config["pad_token_id"],
                           multiple=here.multiple)
    net.eval()
    for i, batch in enumerate(progress.bar_around(batches, math.ceil(N / batch_size), here)):
        if signals:
            signals.check(i)
        if i % here.world == here.rank:
            (rows,) = here.copies(batch.rows)
            outputs[rows] = predict_batch(net, batch, here)
    net.train()
    machine.sum_up([outputs])                              # rows of other processes are 0 here
    if not outputs.isfinite().all():
        raise FloatingPointError("the model's outputs are not finite: try --dtype fp32 or a "
                                 "smaller --lr")
    outputs = outputs.cpu()
    predicted = outputs.argmax(1) if net.num_labels > 1 else outputs.squeeze(1)
    return predicted, outputs


def evaluate(net, examples, task, batch_size, here, signals=None):
    """({dev split: {metric: value}}, {dev split: predictions (N,)})."""
    scores, predictions = {}, {}
    for name, split in examples.items():
        if name != "train":
            predictions[name], _ = predict(net, split, batch_size, here, signals)
            scores[name] = data.metrics(task, predictions[name], split.labels)
    return scores, predictions


# --- from the command line ----------------------------------------------------------------

def evaluate_adapter(given):
    """--eval: show the scores of an adapter, and write what is asked for."""
    with user_errors():
        tensors, stored = folder.load_adapter(given["eval"])
        o = options.evaluating(stored["settings"], given)
        here = machine.join(o.device, o.dtype)
        task, examples, unseen, net, _ = prepare(o, here, stored)
        load_lora2_state_dict(net, tensors)
    scores, predictions = evaluate(net, examples, task, o.batch_size, here)
    if here.is_main and scores:
        progress.show_scores(scores, predictions)
    write_outputs(o, here, task, unseen, net)


def write_outputs(o, here, task, unseen, net, adapter=None):
    """--predict, --merge, --export-peft. adapter: a file to load first, or None."""
    if adapter and (o.predict or o.merge or o.export_peft):
        tensors, _ = folder.load_adapter(adapter)
        load_lora2_state_dict(net, tensors)
    predicted, outputs = None, None
    if unseen is not None:
        predicted, outputs = predict(net, unseen, o.batch_size, here)
    if here.is_main:
        export.write_outputs(o, task, net, predicted, outputs)


def resume(given):
    """--resume: go on with a run, or show one that has ended and write what more is asked for."""
    result = folder.load_result(given["resume"])
    if result:
        wanted = progress.finished(given, result)
        if wanted:
            evaluate_adapter(wanted)
    else:
        saved = folder.load_state(given["resume"])
        train(options.resumed(saved["settings"], given), saved)


def run_command(argv):
    """Parse a command line; then evaluate, resume, run the demo or train."""
    given = options.parse(argv, __doc__)
    if "eval" in given:
        evaluate_adapter(given)
    elif "resume" in given:
        resume(given)
    elif given.get("task") == "demo" and "model" not in given:
        demo.main(given, train)
    else:
        train(options.resolve(given))
    machine.leave()


def main(argv=None):
    """The command line; returns the exit status. A user's mistake is one line, a bug is not."""
    return exit_status(run_command, argv)


if __name__ == "__main__":
    sys.exit(main())
