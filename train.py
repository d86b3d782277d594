"""Fine-tune DeBERTaV3, RoBERTa or BERT on GLUE with LoRA² (arXiv 2408.06854) or another method.

    python train.py --task demo                    # nothing to download, under a minute
    python train.py --task rte --k 1               # DeBERTaV3-base and RTE, fetched if missing
    python train.py --task cola --k 8 --model roberta-large --data-dir ~/glue --out runs/cola
    python train.py --resume runs/cola             # go on after a stop, or show the result
    python train.py --eval runs/cola/adapter.safetensors --predict ~/glue/CoLA/test.tsv
    python train.py --train-file mine.tsv --dev-file dev.tsv  # with columns sentence, label
    torchrun --nproc_per_node=2 train.py --task mnli --k 8    # several devices, the same batches

What the functions pass on: `o`, the options; `here`, this process (device, dtype, rank, world);
`plan`, when to evaluate, save, prune and stop; `state`, the step and the best score so far;
`finite`, which notices NaN and does not wait for the GPU.
"""
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F

import data
import model as models
from lora2 import load_lora2_state_dict, lora2_state_dict
from methods import by_name, fast
from running import demo, export, folder, inputs, machine, options, progress, saving, schedule
from running.errors import FiniteCheck, exit_status, user_errors

# --- one run: data → model → adapters → optimizer → loop → result --------------------------

def train(o, saved=None):
    """One run. o: the options, a Namespace. saved: what its last.pt holds, if it is to go on."""
    with user_errors():                                    # a user's mistake: one line, status 2
        here = machine.join(o.device, o.dtype)
        task, examples, unseen, net, identity = prepare(o, here)
        plan = schedule.plan(o, rows=len(examples["train"].labels))
        pruner = by_name.make_pruner(o.method, net, o.target_rank, o.importance,
                                     o.sora_threshold, **plan.pruning())     # T, t_i, t_f, ΔT
    optimizer, parameters = make_optimizer(net, o.lr, o.head_lr, o.weight_decay, o.outer_lr)
    state, finite = schedule.State(), FiniteCheck(here.device, o.out)
    loss_of = partial(part_loss, net, here)                # of a part of a batch
    R_of = by_name.regulariser(o.method, net, o.reg_terms)  # LoRA²: Eq. 5; None if there is none
    backward = fast.make_backward(net, parameters, o.eager)  # on a GPU it replays CUDA graphs
    take_snapshot = partial(snapshot, state, net, optimizer, pruner, finite, here)  # for last.pt
    with (saving.RunFolder(identity, plan, here, take_snapshot) as run_folder,
          machine.Signals(here) as signals, progress.Log(o, plan, here, task, net, finite) as log):
        if saved:
            go_on(saved, run_folder, state, net, optimizer, pruner, here)
        else:
            run_folder.begin(o)
        log.start(state, examples)
        batches = stream(examples["train"], o, plan, state.step, net, here)
        while True:
            if plan.evaluates(state):                      # never before the first step
                finite.check()
                scores, predicted = evaluate(net, examples, task, o.batch_size, here, signals)
                run_folder.keep_best(state, net, pruner, task, scores, predicted)
                log.evaluation(state, scores, predicted)
            if plan.saves(state):
                run_folder.save()
            if plan.is_over(state):
                break
            signals.check(state.step)          # raises Stopped after Ctrl-C; run_folder then saves
            # ---- one training step -------------------------------------------------------
            batch = next(batches)                # ids, mask, types (B, T); labels, rows (B,)
            state.step += 1
            loss = gradients(loss_of, batch, here, o.accum, backward)  # forward and backward
            R = backward(R_of, weight=o.reg) if R_of else None  # γ = o.reg; adds γ R's gradients
            update(optimizer, parameters, loss, plan, state.step, o.clip, finite)
            kept = pruner.step() if pruner else None  # LoRA²: Algorithm 1; gradients are clipped
            optimizer.zero_grad()
            # ------------------------------------------------------------------------------
            log.training(state, batch, loss, R, kept, optimizer, pruner)  # a line every ten steps
        run_folder.finish(state, net, pruner, task)
    write_best(o, here, task, unseen, net)


# --- data → model → adapters → optimizer --------------------------------------------------

def prepare(o, here, stored=None):
    """What a user's mistake can break, before anything is written: data, model and adapters.

    stored: what the adapter that is to be evaluated says of itself; None to train.
    Returns (task, {split: Examples}, Examples of --predict or None, model, identity: what a stored
    run or adapter has to agree with).
    """
    saving.check_destinations(o)
    task, examples, tokenizer = inputs.load_examples(o, here, stored)
    torch.manual_seed(o.seed)                              # before head and adapters are drawn
    outputs = len(task.labels) or 1                        # a score has no labels
    net = models.from_pretrained(o.model, outputs, o.head_dropout, task.labels)
    if o.max_len > net.max_len:
        raise ValueError(f"--max-len {o.max_len}: this model takes {net.max_len} tokens at most")
    data.check_ids(examples, net.config, o.model)
    unseen = examples.pop("to predict", None)              # of --predict
    identity = folder.identity_of(o, here, task, net, tokenizer, examples)
    if stored:
        folder.check_adapter(stored, identity, o.eval)

    targets = models.target_modules(net, o.targets) if o.targets else []   # BitFit has none
    by_name.add_method(o.method, net, targets, net.head, o.k, o.r, o.alpha, o.init)
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
            peak = head_lr if models.in_head(name, net.head) else lr
            if outer_lr is not None and name.endswith(by_name.OUTER):
                peak = outer_lr
            decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else weight_decay
            if (peak, decay) not in groups:
                groups[peak, decay] = {"params": [], "peak": peak, "lr": peak,
                                       "weight_decay": decay}
            groups[peak, decay]["params"].append(p)
    parameters = [p for group in groups.values() for p in group["params"]]
    return torch.optim.AdamW(list(groups.values()), fused=True), parameters


# --- the parts of a step: the benchmark times these very functions ------------------------

def gradients(loss_of, batch, here, accum, backward):
    """The mean loss over a batch, a scalar. Its gradients are added to those of the parameters.

    The batch is cut into n = world · accum parts. Part i has the rows i, i + n, i + 2n, ..., and
    process p has the parts p, p + world, ... A part counts by its share of the rows. R, the same in
    each process, is not in it: it is added after the sum over the processes.

    loss_of: part_loss(), given net and here. backward: see methods/fast.py.
    """
    loss = torch.zeros((), device=here.device)
    n = here.world * accum
    parts = min(n, len(batch.rows))                        # that are not empty
    for i in range(here.rank, parts, here.world):
        part = here.copies(*(tensor[i::n] for tensor in batch))
        share = len(part[0]) / len(batch.rows)
        loss += share * backward(loss_of, *part, weight=share)
    machine.sum_gradients(loss, backward.parameters)       # one process: nothing to do
    return loss


def part_loss(net, here, ids, mask, types, labels, rows):
    """The mean loss over the rows of a part of a batch: a scalar."""
    part = data.Batch(ids, mask, types, labels, rows)
    return task_loss(predict_batch(net, part, here), labels)


def update(optimizer, parameters, loss, plan, step, max_norm, finite):
    """Clip the gradients to a norm, set the learning rates of this step, AdamW.

    From the first loss or norm that is not finite, is_broken is 1, and a fused AdamW whose
    found_inf is 1 skips its steps, as with a GradScaler. Nothing here waits for the device:
    finite.check() raises later.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    is_broken = finite.note(loss + norm, step)             # 0.0 or 1.0, on the device
    optimizer.found_inf = is_broken
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * plan.lr_factor(step)
    optimizer.step()


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


def stream(examples, o, plan, step, net, here):
    """Batches without end, from after that step on; epoch e's order is drawn from seed and e."""
    epoch, skip = divmod(step, plan.per_epoch)
    while True:
        order = torch.Generator().manual_seed(o.seed * 1_000_003 + epoch)
        yield from data.batches(examples, o.batch_size, net.config["pad_token_id"], order, skip,
                                here.multiple)
        epoch, skip = epoch + 1, 0


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


# --- what --resume needs ------------------------------------------------------------------

def snapshot(state, net, optimizer, pruner, finite, here):
    """What last.pt holds: all on which the rest of a run depends, tensors and plain values."""
    finite.check()                                         # no bad step is saved
    return {"step": state.step, "tokens": state.tokens, "seconds": state.elapsed(),
            "evaluations": state.evaluations, "adapter": state.adapter,
            "weights": lora2_state_dict(net),
            "optimizer": optimizer.state_dict(),
            "pruner": dict(pruner.state_dict()) if pruner else {},
            "rng": machine.gathered(machine.random_state(here), here)}


@user_errors()
def go_on(saved, run_folder, state, net, optimizer, pruner, here):
    """Put back what snapshot() gave, in place."""
    state.best, state.adapter = run_folder.reopen(saved, optimizer)
    state.step = saved["step"]
    state.tokens = saved["tokens"]
    state.seconds = saved["seconds"]
    state.evaluations = saved["evaluations"]
    load_lora2_state_dict(net, saved["weights"])
    of_adamw = optimizer.state_dict()                      # this run's groups, the saved moments
    of_adamw["state"] = saved["optimizer"]["state"]
    optimizer.load_state_dict(of_adamw)
    if pruner:
        pruner.load_state_dict(saved["pruner"])
    machine.set_random_state(here, saved["rng"][here.rank])
    saved.clear()                                          # its tensors are copied: free them


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
    predict_and_write(o, here, task, unseen, net)


def write_best(o, here, task, unseen, net):
    """--predict, --merge and --export-peft after a run: of its best adapter, not of the last."""
    if o.predict or o.merge or o.export_peft:
        tensors, _ = folder.load_adapter(f"{o.out}/adapter.safetensors")
        load_lora2_state_dict(net, tensors)
        predict_and_write(o, here, task, unseen, net)


def predict_and_write(o, here, task, unseen, net):
    """--predict, --merge and --export-peft, of the adapters that the model now holds."""
    predicted, outputs = None, None
    if unseen is not None:
        predicted, outputs = predict(net, unseen, o.batch_size, here)
    if here.is_main:
        export.write_outputs(o, o.out, task, net, predicted, outputs)


def act(argv):
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


def main(argv=None):
    """The command line; returns the exit status. A user's mistake is one line, a bug is not."""
    return exit_status(act, argv)


if __name__ == "__main__":
    sys.exit(main())
