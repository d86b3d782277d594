"""Files that are whole or absent, and what goes wrong with files as one sentence."""
import contextlib
import json
import os
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:                            # on Windows nothing is locked
    fcntl = None

import safetensors.torch


def one_line(error, length=200):
    """What an exception says, on one line and cut to a length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length] + " ..."


def warn(text):
    """Say on stderr what a user should know."""
    print(f"warning: {text}", file=sys.stderr)


def cause_of(error):
    """What the system says of an OSError."""
    return error.strerror or one_line(error)


@contextlib.contextmanager
def reading(path, advice):
    """A missing or damaged file becomes OSError or ValueError of a sentence that ends in advice."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} cannot be read ({cause_of(e)}): {advice}") from e
    except Exception as e:
        cause = one_line(e, 100)
        raise ValueError(f"{path} is damaged or another kind of file ({cause}): {advice}") from e


def read_json(path, advice):
    """The content of a JSON file; OSError or ValueError of a sentence that ends in the advice."""
    with reading(path, advice):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_object(path):
    """The object in a JSON file; ValueError that names the file if it is not one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:      # no UTF-8, no JSON, a million digits, [[[[[...
        raise ValueError(f"{path} is not valid JSON ({one_line(e)}): download it again") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: download it again")
    return content


@contextlib.contextmanager
def writing(path):
    """What a full disk or a lost folder makes its writer raise becomes one sentence: OSError."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} could not be written ({cause_of(e)}), what was there is untouched: "
                      "make room or give another folder") from e


@contextlib.contextmanager
def alone(folder, program, option="--out"):
    """Hold a folder, made if need be, for this process: ValueError if another `program` does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another {program} is running in {folder}: wait for it, or give "
                             f"another {option}") from None
        except OSError:                        # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)                   # as the end of the process does, however it ends


@contextlib.contextmanager
def replacing(*paths):
    """Gives a path beside each of these to write to; they are renamed when all are on the disk.

    So a file with its final name is complete, also if the power fails. After an error while they
    are written all are as before.
    """
    paths = [Path(path) for path in paths]
    beside = [path.with_name(f".{path.name}.tmp") for path in paths]
    try:
        yield beside
        for path in beside:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for new, path in zip(beside, paths):
            os.replace(new, path)
    except Exception as e:
        for path in beside:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if isinstance(e, safetensors.SafetensorError):   # its word for a full disk
            raise OSError(one_line(e)) from e
        raise


def write_file(path, *parts):
    """Write bytes or text so that `path` is either as before or complete."""
    with writing(path), replacing(path) as (beside,), open(beside, "wb") as file:
        for part in parts:
            file.write(part.encode() if isinstance(part, str) else part)


def write_json(path, content):
    """Write a dict or list as JSON, keys in order; whole or not at all, as write_file()."""
    write_file(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_tensors(path, tensors, metadata):
    """Write {name: tensor} and {text: text} as .safetensors; whole or not at all."""
    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    write_file(path, safetensors.torch.save(ready, metadata=metadata))
