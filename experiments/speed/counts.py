"""What can be counted instead of timed: it is the same on every machine, however busy.

    with Operations() as counted: ...      # aten operations and host reads
    saved(forward, model)                  # bytes a forward pass keeps for the backward pass
    flops(step)                            # of its matrix products
"""
import collections
import sys

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

# Operations that return numbers, or shapes that depend on numbers: on a GPU the host waits for
# them. On a CPU three more pass no dispatcher; they are caught where they are called.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item",
         "unique_dim", "_unique", "_unique2", "unique_consecutive"}
CALLED_READS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
flop_registry[torch.ops.aten.baddbmm_] = flop_registry[torch.ops.aten.baddbmm]     # torch lacks it


class _Calls(TorchFunctionMode):
    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.counted.reads += function in CALLED_READS
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Context that counts the aten operations inside, forward and backward.

    names: a Counter of those that compute, copy or allocate; those that only look at the same
    memory in another shape (view, t, expand, detach ...) are not. total: how many they are.
    reads: how often the host waited for a number of the device.
    """

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()
        self.total = self.reads = 0
        self._calls = _Calls(self)

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.reads += name in READS
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            kinds = {part.dtype for part in args[1] if part is not None}
            self.reads += bool(kinds & {torch.bool, torch.uint8})              # looks for its Trues
        if not function.is_view and name != "_unsafe_view":
            self.names[name] += 1
            self.total += 1
        return function(*args, **(kwargs or {}))


def count_parts(step):
    """{part of a step: how many operations}; "total", "host reads" of all parts, "update" of two.

    They are of a second step: the first makes plans and AdamW's state.
    """
    parts = collections.defaultdict(Operations)
    step()
    step(parts.__getitem__)
    found = {part: counted.total for part, counted in parts.items()}
    found["total"] = sum(found.values())
    found["update"] = parts["clip, AdamW"].total + parts["importance, selection"].total
    found["host reads"] = sum(counted.reads for counted in parts.values())
    return found


def saved(forward, model):
    """What autograd keeps between forward() and backward(): a Counter, "dtype shape" → bytes.

    What a view refers to is kept as a whole, so whole storages count, each once. The model's
    parameters and buffers do not: they are there anyway. Nothing is kept in fact: a weak reference
    is enough to know a storage again. What an autograd.Function keeps as an attribute, past
    save_for_backward, is not seen.
    """
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    storages = {}
    kept = collections.Counter()

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known and storage._cdata not in storages:
            storages[storage._cdata] = StorageWeakRef(storage)     # no other gets this address
            shape = " × ".join(map(str, tensor.shape))
            kept[f"{str(tensor.dtype).removeprefix('torch.')} {shape}"] += storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: None):
        forward()
    return kept


def peak_bytes(step, before):
    """Bytes that a GPU has reserved for three steps, beyond those before: two to be recorded."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    return torch.cuda.max_memory_reserved() - before


def synchronises(step):
    """1 if the host waits for the GPU inside a step, else 0."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        return 0
    except RuntimeError as error:
        print(f"row 7: {error}", file=sys.stderr)
        return 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


def flops(step):
    """FLOPs, two for each multiply-add, of the matrix products of a step, which is not recorded."""
    with FlopCounterMode(display=False) as counted:
        step()
    return counted.get_total_flops()
