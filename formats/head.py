"""The head that a checkpoint brings: taken, with its classes in the task's order, or left out."""
import re

from formats.disk import warn


def fit_head(weights, layers, config, labels, source):
    """Make the head among the weights that of a task: in place; what is left out is drawn anew.

    weights: {key of the model: tensor}. layers: {name: nn.Linear} of the model's head, the output
    last. config: a checked one, whose id2label names the file's classes. labels: names of the
    task's classes, in order; None if the caller does not say. source: what messages call the file.
    ValueError for names that contradict each other.
    """
    *inner, output = layers
    keys = [f"{output}.weight", f"{output}.bias"]
    if not weights.keys() >= set(keys):                # none, or half of one: loading refuses that
        return
    n = weights[keys[1]].numel()
    wanted, d = layers[output].weight.shape
    if weights[keys[0]].shape != (n, d) or weights[keys[1]].dim() != 1:
        return                                         # damaged: loading refuses it
    reason = of_other_kind(weights, inner, config)
    if not reason and n != wanted:
        reason = f"it has {n} label(s) where {wanted} are asked for"
    if not reason and labels:
        names = names_of(config, n, source)
        order = order_of(names, labels)
        if order is None:
            reason = f"its labels are {', '.join(names)}, and the task's {', '.join(labels)}"
        elif not order:
            warn(f"{source}: its head does not say what its labels mean, they are taken to be "
                 f"{', '.join(labels)} in this order")
        else:
            for key in keys:
                weights[key] = weights[key][order].contiguous()
    if reason:
        warn(f"{source}: the last layer of its head is left out, {reason}; a new one is drawn")
        for key in keys:
            del weights[key]


def missing_layers(weights, layers):
    """{key: parameter} of the head's layers that have no weight at all; half of one is refused."""
    new = {}
    for name, layer in layers.items():
        both = {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
        if weights.keys().isdisjoint(both):
            new |= both
    return new


def of_other_kind(weights, inner, config):
    """Why a head is not that of a classifier of texts, "" if it is."""
    if any(f"{name}.weight" not in weights and f"{name}.bias" not in weights for name in inner):
        return "it has no pooler and so is a head for tokens"
    other = re.search(r"\w+For(?!SequenceClassification)\w+", str(config.get("architectures")))
    return f"it is that of {other[0]}" if other else ""


def names_of(config, n, source):
    """What config.json calls the n classes of a head."""
    ids = config.get("label2id") or {}
    turned = {str(i): name for name, i in ids.items()} if isinstance(ids, dict) else {}
    names = config.get("id2label") or turned or {str(i): f"LABEL_{i}" for i in range(n)}
    if not isinstance(names, dict) or names.keys() != set(map(str, range(n))):
        raise ValueError(f"{source}: id2label = {names!r} in its config.json does not name the {n} "
                         "labels of its head: correct it")
    names = [str(names[str(i)]) for i in range(n)]
    if not isinstance(ids, dict) or any(ids.get(name, i) != i for i, name in enumerate(names)):
        raise ValueError(f"{source}: label2id = {ids!r} in its config.json contradicts id2label, "
                         f"{', '.join(names)}: correct one of them")
    return names


def order_of(names, labels):
    """Which of the names each label is: a list; [] if the names say nothing, None if they differ.

    Capitals do not count, unless they alone tell labels apart.
    """
    for spelt in (str, str.casefold):
        theirs = [spelt(name) for name in names]
        mine = [spelt(label) for label in labels]
        if sorted(theirs) == sorted(mine) and len(set(mine)) == len(mine):
            return [theirs.index(label) for label in mine]
    nameless = [re.fullmatch(r"(label)?[ _-]?\d+", name.casefold()) for name in names]
    return [] if all(nameless) else None
