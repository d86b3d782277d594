"""What a run has to do with the machine: its device, the other processes of torchrun, Ctrl-C and SIGTERM."""
import contextlib
import ctypes
import os
import platform
import signal

import torch
import torch.distributed as dist

from formats.disk import one_line


def join(name):
    """(torch.device, rank, number of processes); where torchrun started this one, together with the others.

    The device of that name, or the first there is of cuda, mps and cpu; each process has a GPU of its own.
    """
    world, local = (int(os.environ.get(name, default)) for name, default in (
        ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    has_mps = torch.backends.mps.is_available() and world == 1                 # gloo knows no mps
    found = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    wanted, gpus = name or found, torch.cuda.device_count()
    if wanted == "cuda" and 0 < gpus <= local:
        raise ValueError(f"process {local} has no GPU, there are {gpus}: give --nproc_per_node={gpus}")
    try:
        gpu = f"cuda:{local}"
        device = torch.zeros(1, device=gpu if wanted == "cuda" else wanted).device
        assert device.type in ("cuda", "mps", "cpu")
    except (RuntimeError, AssertionError) as e:            # unknown, absent, or torch was built without it
        why = f" ({one_line(e, 100)})" if str(e) else ""
        other = found if wanted != found else "another, such as cpu"           # a GPU that is full or busy
        raise ValueError(f"--device {wanted} cannot be used here{why}: give {other}") from e
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return device, dist.get_rank() if world > 1 else 0, world


def keep_freed_memory():
    """Have malloc keep what a step frees for the next one: a training step on a CPU is 10 to 18 % faster.

    By default glibc hands large blocks back to the system, and gets them back zeroed, page by page. The price
    is about an eighth more memory. Other systems' malloc is left as it is. (Not by M_MMAP_THRESHOLD: an
    older glibc, 2.31 say, refuses more than 32 MB, and as any mallopt() fixes the threshold, at 128 KB, it
    would be slower than without.)
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4              # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)                        # no block is a mapping of its own,
        libc.mallopt(M_TRIM_THRESHOLD, -1)                 # and the heap's end is never given back


def emulates_bf16(device):
    """Whether a device ("cpu", "cuda", ...) has no arithmetic for bf16: such a CPU is far faster in fp32."""
    if device == "cpu":                                    # 0.65 GFLOP/s in place of 63 without AVX-512
        return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def leave():
    """Part from the other processes at the end of a run; after an error they find out for themselves."""
    if dist.is_initialized():
        dist.destroy_process_group()


def together(operation, *arguments):
    """An operation of all processes. Where one has died the others end with a sentence instead of waiting."""
    try:
        operation(*arguments)
    except RuntimeError as e:
        raise ConnectionError(f"another process of this run has ended ({one_line(e, 100)}): see what it "
                              "says; --resume goes on from last.pt") from e


def name_of(device):
    """What results were made on: a GPU's model, else "cpu" or "mps"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


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
        torch._foreach_copy_(tensors, [part.view_as(tensor) for tensor, part in zip(tensors, parts)])


def gradients(parameters):
    """The gradients; zeros for a parameter that got none, as in a process without a row of a small batch."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in parameters]


def peak_memory(device):
    """The most memory this process has held so far, in GB: on a GPU that of its tensors, else all of it.

    None where the system does not tell (Windows, gVisor). On Linux getrusage() would count what the process
    that started this one held.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError):
        with open("/proc/self/status", encoding="utf-8") as status:
            found = [line for line in status if line.startswith("VmHWM")]      # gVisor has no such line
        return int(found[0].split()[1]) * 1024 / 1e9 if found else None
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9        # on a Mac in bytes
    return None


class Stopped(Exception):
    """Ctrl-C, SIGTERM or SIGHUP arrived, and the run can be saved. status: for the shell."""

    def __init__(self, number, run):
        super().__init__(f"stopped after step {run.step} of {run.T}: --resume {run.out} goes on")
        self.status = 128 + number


class Signals:
    """Inside `with`, Ctrl-C, SIGTERM and a lost terminal are only noted; check() raises Stopped where the
    state is whole."""

    def __enter__(self):
        self.number = 0
        numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
        self.previous = {n: signal.signal(n, self.note) for n in numbers
                         if signal.getsignal(n) is not signal.SIG_IGN}         # as nohup has SIGHUP
        return self

    def note(self, number, frame):
        if self.number:
            raise KeyboardInterrupt                        # the second one does not wait
        self.number = number

    def check(self, run, all_are_here=False):
        """Several processes agree first, so that none waits for another that has stopped: on GPUs, which they
        would wait for, every 10 steps. (torchrun kills 30 seconds after a Ctrl-C.)"""
        if run.world == 1:
            highest = self.number
        elif all_are_here or run.step % 10 == 0 or run.device.type == "cpu":
            highest = torch.tensor(float(self.number), device=run.device)
            together(dist.all_reduce, highest, dist.ReduceOp.MAX)
        else:
            return
        if highest:
            raise Stopped(int(highest), run)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
