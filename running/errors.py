"""What went wrong, as one line: a user's mistake is status 2, a failure 1, a bug a traceback."""
import contextlib
import sys
from pathlib import Path

import torch

from formats.disk import one_line

GPU_IS_FULL = ("the GPU's memory is full: begin again with --overwrite and --accum 2, which "
               "needs less; to evaluate give a smaller --batch-size")


class Refused(Exception):
    """What a user gave cannot be used; the message says what to do."""


class Stopped(Exception):
    """Ctrl-C, SIGTERM or SIGHUP arrived: the message is for the user, the status for the shell."""

    def __init__(self, number):
        super().__init__("stopped")
        self.status = 128 + number


@contextlib.contextmanager
def user_errors():
    """Around all that a user's mistake can break and nothing else: a bug shall look like one."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise Refused(one_line(error, 2000)) from error


def exit_status(action, *arguments):
    """Run an action of the command line, print what goes wrong; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # no run shall end for a Λ that a console lacks
    try:
        action(*arguments)
        return 0
    except Refused as error:
        text, status = f"error: {error}", 2
    except RuntimeError as error:
        full = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # a Mac's has no class of its own
        if not any(words in str(error) for words in full):
            raise
        text, status = f"error: {GPU_IS_FULL}", 1
    except (FloatingPointError, OSError) as error:         # diverged; a full disk, a lost process
        text, status = f"error: {error}", 1
    except Stopped as stop:
        text, status = str(stop), stop.status
    except KeyboardInterrupt:
        text, status = "stopped: what was written before is whole", 130
    print(text, file=sys.stderr)
    return status


class FiniteCheck:
    """Remembers, on the device, the first step whose loss or gradients were not finite.

    No step waits for the device: note() only sets a flag there, and check() reads it before
    anything is logged or written. out: the run folder, for the message.
    """

    def __init__(self, device, out):
        self.bad_step = torch.zeros((), device=device)     # 0: none
        self.out = out

    def note(self, value, step):
        """1.0 if this scalar or one before was not finite, else 0.0: a scalar on the device."""
        is_first = (self.bad_step == 0) & ~torch.isfinite(value)
        self.bad_step = torch.where(is_first, float(step), self.bad_step)
        return self.bad_step.sign()

    def check(self):
        """FloatingPointError that names the step, if there was one."""
        if bad_step := int(self.bad_step.item()):
            raise FloatingPointError(
                f"loss or gradient was not finite at step {bad_step}; the last good state is in "
                f"{Path(self.out) / 'last.pt'}: begin again with a smaller --lr, a longer "
                "--warmup or --dtype fp32, and --overwrite")
