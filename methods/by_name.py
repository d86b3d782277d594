"""The methods of the paper's Table 1, by their names: one loop trains all, by LoRA²'s calls.

    lora2     W0 + (alpha / r) v u Λ U V, pruned              lora2.py
    adalora   W0 + (alpha / r) P Λ Q, pruned                  Zhang et al., arXiv 2303.10512
    lora      W0 + (alpha / r) B A                            Hu et al., arXiv 2106.09685
    sora      W0 + (alpha / r) B diag(g) A, sparse gate g     Ding et al., arXiv 2311.11696
    bitfit    every bias, and the head                        Ben Zaken et al., arXiv 2106.10199
    full      every weight                                    nothing added, nothing frozen
    head      the classification head alone                   what the frozen backbone knows

All methods train the head, the pooler and the classifier; `full` trains all.
"""
from functools import partial

from lora2 import LoRA2Linear, add_lora2, lora2_layers, require
from methods import baselines, fast_lora2
from model import in_head

METHODS = ("lora2", "adalora", "lora", "sora", "bitfit", "full", "head")
OUTER = (".v", ".V", ".A", ".P", ".Q")  # large factors that do not start at 0: --outer-lr
LAYERS = {"lora2": LoRA2Linear, "adalora": baselines.AdaLoRALinear,
          "lora": baselines.LoRALinear, "sora": baselines.SoRALinear}


def add_method(method, model, targets, head, k, r, alpha, init):
    """Freeze what `method` freezes and add what it adds, in place. Returns names of adapted layers.

    targets: names of the layers to adapt.
    head: parts of the names of the head's parameters, as add_lora2() has them in `trainable`.
    k, r, alpha, init: of the adapters; None for a method that has no use for them.
    """
    if method in LAYERS:
        return add_lora2(model, targets, k or 1, r, alpha, init or "gaussian", head, LAYERS[method])
    for name, parameter in model.named_parameters():
        chosen = {"full": True, "bitfit": name.endswith("bias"), "head": False}[method]
        parameter.requires_grad_(chosen or in_head(name, head))
    return []


def regulariser(method, model, terms):
    """A function () that gives R, what `method` adds to the loss times gamma; None without one.

    LoRA²: Eq. 5 with the pairs in `terms`. AdaLoRA: see baselines.orthogonality_loss().
    """
    losses = {"lora2": partial(fast_lora2.orthogonality_loss, model, terms),
              "adalora": partial(baselines.orthogonality_loss, model)}
    return losses.get(method)


def make_pruner(method, model, target_rank, importance=None, threshold=None, **schedule):
    """What prunes: the RankPruner of "lora2" or "adalora", the SparseGates of "sora", or None.

    threshold: of the gates. target_rank, importance, schedule: arguments of RankPruner.
    """
    if method == "sora":
        return baselines.SparseGates(model, threshold)
    kinds = {"lora2": fast_lora2.FastRankPruner, "adalora": baselines.AdaLoRAPruner}
    if method not in kinds:
        return None
    require(method == "lora2" or importance != "full",
            "importance = 'full' is Eq. 8 of LoRA²: AdaLoRA has no v and V to add")
    return kinds[method](model, target_rank, importance=importance or "reduced", **schedule)


def surviving_parameters(model, kept, trained):
    """How many of the `trained` adapter parameters are needed when what was pruned is taken out.

    kept: {adapter: singular values, or gates, that are left}; None for a method that does not
    prune, where all survive. A pruned singular value takes its column and row along, the last one
    of LoRA² also v and V.
    """
    if not kept:
        return trained
    total = 0
    for name, layer in lora2_layers(model):
        n = kept[name]
        ends = layer.in_features + layer.out_features
        if isinstance(layer, baselines.LoRALinear):
            total += n * (1 + ends)  # AdaLoRA: Λ_i, P_·i, Q_i·. SoRA: g_i, A_i·, B_·i
        elif n:
            total += n * (1 + 2 * layer.k) + layer.k * ends
    return total
