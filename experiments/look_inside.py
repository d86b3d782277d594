"""What why.py looks at in a run: the size and direction of ΔW, its factors, and other pruners'
choices beside the one that counts."""
import math
from statistics import mean

import torch

from lora2 import RankPruner, lora2_layers


class Judge(RankPruner):
    """A RankPruner that may look at less, and may judge without pruning.

    of_task: its I is that of the task's gradient, without what R adds. by_mean: S = Ī, without Ū.
    """

    prunes, of_task, by_mean = True, False, False
    returned = 0                        # how often a choice took back what the one before left out

    def see(self):
        """Remember the gradients of the task, before those of R are added."""
        self.seen = [w.grad.clone() for w in self.scored()]

    def step(self):
        """As a RankPruner's, of the task's gradients as clipping leaves them, if those count."""
        gradients = [w.grad for w in self.scored()]
        if self.of_task:
            for w, gradient in zip(self.scored(), self.seen):
                w.grad = gradient * self.clipped
        super().step()
        for w, gradient in zip(self.scored(), gradients):
            w.grad = gradient

    def scores(self):
        """As a RankPruner's, with Ū = 1 if Ī alone counts."""
        before = self.uncertainty.clone()
        if self.by_mean:
            self.uncertainty.fill_(1)
        scores = super().scores()
        self.uncertainty.copy_(before)
        return scores

    def choose(self, t):
        before = self.keep.clone()
        super().choose(t)
        self.returned += (self.keep & ~before).sum().item()

    def prune(self, layers):
        if self.prunes:
            super().prune(layers)


def make_judges(row, o, net, plan):
    """{name: Judge} of a LoRA² run: "itself", which prunes as its row says; {} for LoRA.

    In a run that is not pruned two others judge beside it: what one prunes is 0 for all.
    """
    names = []
    if o.method == "lora2":
        names = ["itself", "of-task", "by-mean"] if row == "unpruned" else ["itself"]
    judges = {}
    for name in names:
        judges[name] = judge = Judge(net, o.target_rank, plan.steps, plan.prune_warmup,
                                     plan.prune_final, plan.prune_interval)
        judge.prunes = row != "unpruned"
        judge.of_task = "of-task" in (row, name)
        judge.by_mean = "by-mean" in (row, name)
    return judges


def inner(X, Y):
    """⟨ΔW, ΔW'⟩ of two updates (A, B) of one matrix, a number, without building them."""
    return ((X[1].T @ Y[1]) * (X[0] @ Y[0].T)).sum().item()


def cosine(X, Y):
    """The cosine of two updates of all matrices, each as one long vector; 0 where ΔW = 0."""
    dot = sum(inner(x, y) for x, y in zip(X, Y))
    size = math.sqrt(sum(inner(x, x) for x in X) * sum(inner(y, y) for y in Y))
    return round(dot / size, 4) if size else 0.0


def angle(a, b):
    """Degrees between the lines along two vectors: the principal angle of what they span."""
    share = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).abs().clamp(max=1)
    return math.degrees(math.acos(share.item()))


class Film:
    """Looks at the adapters of a model from time to time, at outer factors if these are lines."""

    def __init__(self, net, judges):
        self.layers = [layer for _, layer in lora2_layers(net)]
        self.judges = judges
        first = self.layers[0] if self.layers else None
        self.factors = [name for name in ("v", "V", "A")   # lines: what is wider has no one angle
                        if 1 in getattr(first, name, torch.empty(0)).shape]
        self.start = [{name: getattr(layer, name).detach().clone() for name in self.factors}
                      for layer in self.layers]
        self.updates, self.seen = [], []

    def look(self, t):
        """Take in what is there after step t."""
        update = [layer.to_lora() for layer in self.layers]
        self.updates.append(update)
        if not update:
            return
        sizes = []
        for its, layer in zip(update, self.layers):
            sizes.append(math.sqrt(inner(its, its)) / layer.base.weight.norm().item())
        seen = {"t": t, "size": mean(sizes)}
        for name in self.factors:
            now = [getattr(layer, name).detach() for layer in self.layers]
            then = [factors[name] for factors in self.start]
            seen[f"turned {name}"] = mean(map(angle, now, then))
        if self.judges:
            itself = self.judges["itself"]
            seen["kept"], seen["returned"] = itself.kept_total, itself.returned
            seen["emptied"] = (~itself.keep.any(1)).sum().item()
            seen["lam"] = mean(layer.lam.abs().max().item() for layer in self.layers)
        for name in self.judges.keys() - {"itself"}:
            judge = self.judges[name]
            seen[name] = (judge.keep & itself.keep).sum().item() / itself.kept_total
        self.seen.append(seen)

    def developed(self):
        """{what was seen: a number for each look}, with the cosine of each update to the last.

        Empty without adapters.
        """
        found = {}
        if self.seen:
            found["to the last"] = [cosine(update, self.updates[-1]) for update in self.updates]
            for name in self.seen[0]:
                found[name] = [float(f"{seen[name]:.4g}") for seen in self.seen]
        return found
