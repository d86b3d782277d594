"""A GPU that is simulated on the CPU, so that train.py's CUDA path is run where there is none.

    python -m tests.simulated_gpu simulated_gpu.so    # then a run of train.py for each line of JSON, see serve()

Its tensors say device cuda:0 and hold a tensor of the CPU, on which operations work. What a GPU would refuse is
refused: to mix devices; gradients laid out unlike their parameters in fused AdamW; in a recording (a CUDA graph, here
a list of operations) whatever passes between host and GPU, and nodes of autograd from another stream. Its random
numbers are its own. Not simulated: what kernels round otherwise, memory (that graphs share it), time. Written for torch 2.13.
"""
import collections
import contextlib
import ctypes
import functools
import io
import json
import sys
import traceback
import types
from pathlib import Path

if __name__ == "__main__":
    LIBRARY = ctypes.CDLL(sys.argv[1])                     # before torch, which asks once what there is

import torch
import torch.cuda.amp.common
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from experiments.speed import counts
from formats import toy

ROOT = Path(__file__).resolve().parents[1]
READS = counts.READS | {"bincount", "repeat_interleave"}   # the host waits until these have their result
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Simulated(torch.Tensor):
    """A tensor of the simulated GPU; `inner` is the CPU's that holds its numbers."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="cuda:0")

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, _, args=(), kwargs=None):
        return GPU.operate(function, args, kwargs or {})

    def __reduce_ex__(self, protocol):                     # what torch.save() writes
        GPU.waits("torch.save")
        return self.inner.__reduce_ex__(protocol)

    def storage(self):                                     # safetensors asks who shares memory
        return self.inner.storage()

    def tolist(self):
        GPU.waits("tolist")
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def mapped(function, value):
    """value, but of each tensor in its lists, tuples and dicts what the function makes of it."""
    return tree_map_only(torch.Tensor, function, value)


def tensors_in(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def on_cpu(args, kwargs):
    """The same arguments for the CPU."""
    args, kwargs = tree_map_only(Simulated, lambda tensor: tensor.inner, (args, kwargs))
    return args, kwargs | ({"device": "cpu"} if kwargs.get("device") is not None else {})


def written(function, args, kwargs):
    """The tensors among its arguments that an operation writes to."""
    found = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            found += tensors_in(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


class Device:
    """The GPU: what it does with an operation, and what it knows meanwhile."""

    def __init__(self):
        self.strict = False                                # set_sync_debug_mode("error")
        self.recording = None                              # a Graph
        self.asked = collections.Counter()                 # what the host had it do: not what a graph repeats
        self.random = torch.Generator().manual_seed(0).get_state()

    def manual_seed_all(self, seed):
        self.random = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device=None):
        return self.random.clone()

    def set_rng_state(self, state, device=None):
        self.random = state.clone()

    def set_sync_debug_mode(self, mode):
        self.strict = mode == "error"

    def operate(self, function, args, kwargs):
        """An operation of torch that has to do with the GPU; its result."""
        name = function.overloadpacket.__name__
        tensors = tensors_in((args, kwargs))
        ours = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, Simulated)}
        theirs = [tensor for tensor in tensors if not isinstance(tensor, Simulated)]
        here = bool(ours)                                  # whether the result is on the GPU
        if name in ("_to_copy", "copy_"):
            here = self.copies(name, args, kwargs)
        elif ours:
            self.refuse_mixed(name, args, theirs)
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"]).type == "cuda"
        if name in READS:
            self.waits(name)
        if name.startswith("_fused_adamw"):
            refuse_strides(*args[:4])
        self.asked[name] += not function.is_view
        out = self.compute(function, *on_cpu(args, kwargs))

        def known(tensor):                                 # what is written in place is what was given
            return ours[id(tensor)] if id(tensor) in ours else Simulated(tensor)
        return mapped(known, out) if here else out

    def copies(self, name, args, kwargs):
        """Whether a copy is one on the GPU. The host goes on at once if it comes from pinned memory."""
        source = args[0] if name == "_to_copy" else args[1]
        begins = isinstance(source, Simulated)
        ends = isinstance(args[0], Simulated)
        at_once = kwargs.get("non_blocking") or args[2:] == (True,)
        if kwargs.get("device") is not None:
            ends = torch.device(kwargs["device"]).type == "cuda"
        if begins != ends and not (ends and at_once and hasattr(source, "is_pinned_here")):
            self.waits(f"a copy {'to' if ends else 'from'} the GPU")
        if begins != ends and self.recording:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        return ends

    def refuse_mixed(self, name, args, theirs):
        """As a GPU does: the CPU may give a single number, or an index, for which the host waits."""
        if name in INDEXING and isinstance(args[0], Simulated):
            is_mask = [index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]]
            if any(is_mask) or theirs:
                self.waits(f"{name} by a mask or from the CPU")
        elif any(tensor.dim() or name.startswith("_fused") for tensor in theirs):
            raise RuntimeError(f"Expected all tensors to be on the same device, {name}")

    def waits(self, what):
        """The host has to wait here for the GPU."""
        if self.recording:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        if self.strict:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def compute(self, function, args, kwargs):
        """An operation on the CPU, with the GPU's random numbers; a recording notes it."""
        graph = self.recording
        if graph:
            graph.before += [(tensor, tensor.clone()) for tensor in written(function, args, kwargs)]
        if torch.Tag.nondeterministic_seeded in function.tags:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.random)
                out = function(*args, **kwargs)
                self.random = torch.get_rng_state()
        else:
            out = function(*args, **kwargs)
        if graph and not function.is_view:
            graph.tape.append((function, args, kwargs, out))
        return out


GPU = Device()


def refuse_strides(*lists):
    """What fused AdamW asks of parameters, gradients and both moments on a GPU, but not on a CPU."""
    for tensors in zip(*lists):
        layouts = {(t.dtype, t.shape, tuple(s for s, n in zip(t.stride(), t.shape) if n > 1)) for t in tensors}
        dense = torch.empty_like(tensors[0].inner).stride() == tensors[0].stride()
        if len(layouts) > 1 or not dense:
            raise RuntimeError("params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout")


class Graph:
    """A CUDA graph: operations that were recorded and are done again on the same memory."""

    def __init__(self):
        self.tape = []                                     # (operation, its arguments and result)
        self.before = []                                   # (what was written to, its numbers until then)

    def replay(self):
        GPU.asked["replay"] += 1
        with torch._C._DisableTorchDispatch():             # these tensors are the CPU's: twice as fast
            for function, args, kwargs, out in self.tape:
                new = GPU.compute(function, args, kwargs)
                for there, now in zip(tensors_in(out), tensors_in(new)):
                    if there is not now:
                        there.copy_(now)


@contextlib.contextmanager
def record(graph, **_):
    """torch.cuda.graph(). A GPU computes nothing meanwhile: afterwards all numbers are as before."""
    random = GPU.random
    GPU.recording = graph
    LIBRARY.use_stream(1)
    try:
        yield
    finally:
        LIBRARY.use_stream(0)
        GPU.recording = None
        GPU.random = random
        for tensor, numbers in reversed(graph.before):
            tensor.copy_(numbers)
        graph.before.clear()


class Factories(TorchDispatchMode):
    """Inside it what has no tensor as an argument, as torch.zeros(), knows the GPU too."""

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        asked = device is not None and torch.device(device).type == "cuda"
        if asked or any(isinstance(tensor, Simulated) for tensor in tensors_in((args, kwargs))):
            return GPU.operate(function, args, kwargs)
        return function(*args, **kwargs)


# --- what torch.cuda says --------------------------------------------------------------------------------------

SAYS = {"_lazy_init": None, "set_device": None, "is_available": True, "is_bf16_supported": True, "device_count": 1,
        "current_device": 0, "max_memory_allocated": 0, "get_device_name": "simulated", "graph_pool_handle": None}


def pin_memory(tensor, device=None):
    copy = tensor.clone()
    copy.is_pinned_here = True
    return copy


def pretend():
    """Let torch, from now on, believe in the GPU."""
    for name, value in SAYS.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in ("manual_seed_all", "get_rng_state", "set_rng_state", "set_sync_debug_mode"):
        setattr(torch.cuda, name, getattr(GPU, name))
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.asked = GPU.asked
    torch.nn.utils.clip_grad._has_foreach_support = lambda *_: True    # as for tensors of a GPU
    torch.cuda.CUDAGraph = Graph
    torch.cuda.graph = record
    torch.Tensor.pin_memory = pin_memory
    torch.__future__.set_swap_module_params_on_conversion(True)    # a parameter's .data cannot move here


# --- runs ------------------------------------------------------------------------------------------------------

def run(words, changes):
    """train.py on the GPU: {"status", "said"}, status None for an exception. changes: of its text, (old, new)."""
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    train = types.ModuleType("train")
    said = io.StringIO()
    GPU.strict = False
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            exec(compile(source, "train.py", "exec"), train.__dict__)
            status = train.main(words)
        except Exception:
            status = None
            traceback.print_exc()
    return {"status": status, "said": said.getvalue()}


def serve():
    """Answer each line of stdin, [words, changes] in JSON, with one of stdout: what run() returns."""
    pretend()
    toy.language = functools.lru_cache(None)(toy.language)
    with Factories():
        for line in sys.stdin:
            print(json.dumps(run(*json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
