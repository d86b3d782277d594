"""What a run has to do with the machine: device, memory, torchrun's processes, signals."""
import contextlib
import ctypes
import os
import platform
import signal
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from formats.disk import one_line, warn
from running.errors import Stopped


class Machine(NamedTuple):
    """Where a run runs."""
    device: torch.device
    dtype: str                       # of the products: "fp32", or "bf16" by autocast
    rank: int                        # of this process; the one of rank 0 speaks and writes
    world: int                       # number of processes

    @property
    def is_main(self):
        """Whether this process prints and writes files."""
        return self.rank == 0

    @property
    def multiple(self):
        """What the width of a batch is a multiple of: a GPU's products are faster with 8 tokens."""
        return 1 if self.device.type == "cpu" else 8

    def copies(self, *tensors):
        """Copies on the device. On a GPU the host does not wait for them, which takes pinned
        memory: without it the batch could be gone before it is copied."""
        on_gpu = self.device.type == "cuda"
        copies = []
        for tensor in tensors:
            if on_gpu and tensor.device.type == "cpu":
                tensor = tensor.contiguous().pin_memory()
            copies.append(tensor.to(self.device, non_blocking=on_gpu))
        return copies


def join(name=None, dtype=None):
    """The Machine of this process; where torchrun started it, together with the others.

    name: "cuda", "mps" or "cpu"; by default the first of these that there is. Each process has a
    GPU of its own.
    dtype: "fp32" or "bf16"; by default bf16 on a GPU that has it.
    ValueError with a way out for a device that cannot be used.
    """
    world, local = number_from("WORLD_SIZE", 1), number_from("LOCAL_RANK", 0)
    device = find_device(name, local, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        find_others(device, world)
    rank = dist.get_rank() if world > 1 else 0
    imitated = emulates_bf16(device.type)
    if dtype is None:
        dtype = "bf16" if device.type == "cuda" and not imitated else "fp32"
    if dtype == "bf16" and imitated:
        warn(f"this {device.type} has no bf16 arithmetic and imitates it, up to 100 times slower: "
             "give --dtype fp32")
    return Machine(device, dtype, rank, world)


def number_from(variable, default):
    """The whole number in an environment variable, or the default where it is not set or empty."""
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise ValueError(f"the environment says {variable}={text}, which is no number: unset it, "
                         "or start with torchrun")
    return int(text)


def find_others(device, world):
    """Let the processes of a run know each other; ValueError where they cannot."""
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing or number_from("RANK", 0) >= world or not number_from("MASTER_PORT", 0):
        raise ValueError(f"the environment says WORLD_SIZE={world}, without a "
                         f"fitting {', '.join(missing or names)}: unset it, or start with torchrun")
    own_gpu = device if device.type == "cuda" else None
    patience = timedelta(hours=6)                          # the others wait while one downloads
    try:
        dist.init_process_group("nccl" if own_gpu else "gloo", device_id=own_gpu, timeout=patience)
    except RuntimeError as e:                              # such as: two of them have one GPU
        raise ValueError(f"the processes do not find each other ({one_line(e)}): start them with "
                         "torchrun, each with a GPU of its own") from e


def find_device(name, local, world):
    """The torch.device of that name, or the first there is; process `local` has its own GPU."""
    has_mps = torch.backends.mps.is_available() and world == 1                 # gloo knows no mps
    found = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    wanted = name or found
    gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and "," not in visible:
        local = 0                                          # a launcher shows each process its own
    if wanted == "cuda" and 0 < gpus <= local:
        raise ValueError(f"process {local} has no GPU, there are {gpus}: give "
                         f"--nproc_per_node={gpus}")
    try:
        device = torch.zeros(1, device=f"cuda:{local}" if wanted == "cuda" else wanted).device
        assert device.type in ("cuda", "mps", "cpu")
    except (RuntimeError, AssertionError) as e:  # unknown, absent, or torch was built without it
        why = f" ({one_line(e, 100)})" if str(e) else ""
        other = found if wanted != found else "another, such as cpu"  # a GPU that is full or busy
        raise ValueError(f"--device {wanted} cannot be used here{why}: give {other}") from e
    return device


def emulates_bf16(kind):
    """Whether a kind of device ("cpu", ...) has no arithmetic for bf16 and is slow with it."""
    if kind == "cpu":  # 0.65 GFLOP/s in place of 63 without AVX-512
        has_mkldnn = torch.backends.mkldnn.is_available()
        return not (has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def name_of(device):
    """What results were made on: the name of a GPU, else "cpu" or "mps"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


# --- memory -------------------------------------------------------------------------------

def keep_freed_memory():
    """Have malloc keep what a step frees: a step on a CPU is 10 to 18 % faster.

    By default glibc hands large blocks back to the system, and gets them back zeroed, page by page.
    The price is about an eighth more memory. (Older ones refuse an M_MMAP_THRESHOLD above 32 MB.)
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4              # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)                        # no block is a mapping of its own,
        libc.mallopt(M_TRIM_THRESHOLD, -1)                 # and the heap's end is never given back


def peak_memory(device):
    """The most memory this process has held, in GB: on a GPU that of its tensors, else all.

    None where no kernel tells in Linux's way. (getrusage() would count the parent's too.)
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("VmHWM"):                   # gVisor has no such line
                return int(line.split()[1]) * 1024 / 1e9
    return None


# --- random numbers -----------------------------------------------------------------------

def random_state(here):
    """What dropout's generators hold: {"cpu": state, perhaps "cuda" or "mps": state}."""
    state, kind = {"cpu": torch.get_rng_state()}, here.device.type
    if kind != "cpu":
        state[kind] = getattr(torch, kind).get_rng_state()
    return state


def set_random_state(here, state):
    """Put random_state() back; ValueError for what is none.

    A run that began on another device has no state of this one's generator, and goes on.
    """
    kind = here.device.type
    try:
        torch.set_rng_state(state["cpu"])
        if kind != "cpu" and kind in state:
            getattr(torch, kind).set_rng_state(state[kind])
    except (KeyError, TypeError, RuntimeError) as e:       # torch alone can tell
        raise ValueError(f"last.pt holds no random state ({one_line(e, 100)}): begin again with "
                         "--overwrite") from e


# --- several processes --------------------------------------------------------------------

def together(operation, *arguments):
    """An operation of all processes; where one has died, the others end with a sentence."""
    try:
        operation(*arguments)
    except RuntimeError as e:
        raise ConnectionError(f"another process of this run has ended ({one_line(e, 100)}): see "
                              "what it says; --resume goes on from last.pt") from e


def wait_for_all():
    """Return when all processes of the run have come here; ConnectionError if one has died."""
    if dist.is_initialized():
        together(dist.barrier)


def sum_up(tensors):
    """Add up tensors over all processes, in place and in one message."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        together(dist.all_reduce, flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            tensor.copy_(part.view_as(tensor))


def sum_gradients(loss, parameters):
    """Add up loss and gradients over all processes, in place; nothing to do for one.

    A process without a row of a small batch has no gradients: its share is zeros.
    """
    if dist.is_initialized():
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        sum_up([loss] + [p.grad for p in parameters])


def gathered(value, here):
    """[the value of each process], in the order of their ranks."""
    values = [value] * here.world
    if here.world > 1:
        together(dist.all_gather_object, values, value)
    return values


def leave():
    """Part from the other processes at the end of a run; after an error they find out."""
    wait_for_all()                             # with torch 2.6 who leaves later may hang
    if dist.is_initialized():
        dist.destroy_process_group()


# --- signals ------------------------------------------------------------------------------

class Signals(contextlib.ExitStack):
    """Inside `with`, Ctrl-C, SIGTERM and a lost terminal are noted; check() raises Stopped."""

    def __init__(self, here):
        super().__init__()                                 # its end puts the handlers back
        self.here = here
        self.number = 0

    def __enter__(self):
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:               # as nohup has SIGHUP
                signal.signal(number, self.note)
                self.callback(signal.signal, number, before)
        return self

    def note(self, number, frame):
        """The handler."""
        if self.number:
            raise KeyboardInterrupt                        # the second one does not wait
        self.number = number

    def check(self, i):
        """Before step or batch i: raise Stopped if a signal arrived. Several processes agree first.

        On GPUs, which would have to wait for it, they do so every tenth time. (torchrun kills 30
        seconds after a Ctrl-C.)
        """
        highest = self.number
        if self.here.world > 1:
            if self.here.device.type != "cpu" and i % 10 != 0:
                return
            highest = torch.tensor(float(self.number), device=self.here.device)
            together(dist.all_reduce, highest, dist.ReduceOp.MAX)
        if highest:
            raise Stopped(int(highest))
