"""Files that are whole or absent, and what goes wrong with files as one sentence."""
import contextlib
import copy
import hashlib
import json
import os
import pickletools
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

try:
    import fcntl
except ImportError:                            # on Windows nothing is locked
    fcntl = None

import safetensors.torch
import torch

LEFT = ".lora2-tmp"                            # how the names of folders end that we write in first
MEGABYTE = 1 << 20
# All that torch.save() names for dicts, lists, plain values and tensors. (torch.load() also makes
# bytearrays of any size, and tensors whose memory is nowhere in the file.)
PICKLED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|"
                     r"torch (?!Typed|Untyped)[A-Za-z0-9]+Storage")


def one_line(error, length=200):
    """What an exception says, on one line, cut to a length, without passwords and tokens."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(?<=://)[^/\s@]+@|hf_\w{20,}", "", text)
    return text if len(text) <= length else text[:length] + " ..."


def warn(text):
    """Say on stderr what a user should know; of several processes, the first one says it."""
    if (os.environ.get("RANK") or "0") == "0":             # torchrun's
        print(f"warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def reading(path, advice):
    """A missing or damaged file becomes OSError or ValueError of a sentence that ends in advice."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} cannot be read ({e.strerror or one_line(e)}): {advice}") from e
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as e:                 # with Rust's PanicException, which is no Exception
        cause = one_line(e, 100)
        raise ValueError(f"{path} is damaged or another kind of file ({cause}): {advice}") from e


def read_bytes(path, most=16 * MEGABYTE):
    """What a file holds; ValueError if that is more bytes than such a file honestly has."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size:,} bytes, where {most:,} are the most")
        return file.read(size)


def read_json(path, advice):
    """The content of a JSON file; OSError or ValueError of a sentence that ends in the advice."""
    with reading(path, advice):
        return json.loads(read_bytes(path))


def read_object(path):
    """The object in a JSON file of a checkpoint; OSError or ValueError of one sentence if not."""
    content = read_json(path, "download it again")
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: download it again")
    return content


def load_pickle(path):
    """What torch.save() wrote to a file, on the CPU.

    ValueError, before anything is made of it, if it holds more than tensors and plain values, or
    unpacks to more bytes than it has.
    """
    left = os.path.getsize(path)
    is_zip = zipfile.is_zipfile(path)                          # since torch 1.6
    with contextlib.ExitStack() as stack:
        pickles = [stack.enter_context(open(path, "rb"))] * 5  # of old files: one after another
        if is_zip:
            zipped = stack.enter_context(zipfile.ZipFile(path))
            if sum(info.file_size for info in zipped.infolist()) > left:
                raise ValueError("it unpacks to more bytes than it has")
            names = [name for name in zipped.namelist() if name.lower().endswith(".pkl")]
            pickles = [zipped.open(name) for name in names]
        for file in pickles:
            for operation, argument, _ in pickletools.genops(file):
                if "GLOBAL" in operation.name and not PICKLED.fullmatch(str(argument)):
                    raise ValueError(f"it holds more than tensors ({argument}): such a file can "
                                     "run code")

    def counted(storage, location):
        nonlocal left
        left -= storage.nbytes()
        if left < 0:
            raise ValueError("its tensors take more bytes than it has")
        return storage

    # A zip is mapped, which bounds each tensor, and copied: the file may be overwritten later.
    content = torch.load(path, map_location=counted, weights_only=True, mmap=is_zip)
    return copy.deepcopy(content) if is_zip else content


def digest(*parts):
    """Hash of texts, bytes, tensors and dicts of them; no bit changes unnoticed."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, torch.Tensor):
            hasher.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        elif isinstance(part, dict):
            part = digest(*(item for name in sorted(part) for item in (name, part[name])))
        part = part.encode() if isinstance(part, str) else part
        hasher.update(f"{len(part)} ".encode())
        hasher.update(part)
    return hasher.hexdigest()


@contextlib.contextmanager
def writing(path, advice="make room or give another folder; what was there is untouched"):
    """What a full disk or a lost folder makes its writer raise becomes one sentence: OSError."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} could not be written ({e.strerror or one_line(e)}): {advice}") from e


def hold(folder, stack):
    """Hold a folder until an ExitStack is left; returns False where there are no locks.

    BlockingIOError if another process holds it. The end of a process, however it ends, frees it.
    """
    if fcntl is None:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:                            # a file system without locks
        return False
    return True


@contextlib.contextmanager
def alone(folder, program):
    """Hold a folder, made if need be, for this process: ValueError if another `program` does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            has_lock = hold(folder, stack)
        except BlockingIOError:
            raise ValueError(f"another {program} is running in {folder}: wait for it, or give "
                             "another --out") from None
        if not has_lock:
            warn(f"{folder} cannot be locked here: see to it that no other {program} runs in it")
        yield


@contextlib.contextmanager
def private_folder(place):
    """A new folder inside another one, of a name that nobody can foresee; gone afterwards.

    Those that killed processes left behind are removed: nobody holds them any more.
    """
    for left in Path(place).glob(f".*{LEFT}"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if hold(left, stack):              # BlockingIOError: it is in use
                shutil.rmtree(left, ignore_errors=True)                # follows no link
    with contextlib.ExitStack() as stack:
        is_mine = False
        while not is_mine:                     # another process may take it for left behind
            made = Path(tempfile.mkdtemp(LEFT, ".", place))
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                hold(made, stack)
                is_mine = made.exists()
        stack.callback(shutil.rmtree, made, ignore_errors=True)
        yield made


@contextlib.contextmanager
def replacing(*paths):
    """Gives a path for each of these, of one folder, to write to; renamed when all are on the disk.

    So a file with its final name is complete, also if the power fails. After an error while they
    are written all are as before. A link that bears such a name is replaced, never followed.
    """
    paths = [Path(path) for path in paths]
    try:
        with private_folder(paths[0].parent) as folder:
            beside = [folder / path.name for path in paths]
            yield beside
            for path in beside:
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            try:
                for new, path in zip(beside, paths):
                    os.replace(new, path)
            except KeyboardInterrupt:          # the same command begins again: see LEFT
                tempfile.mkdtemp(LEFT, ".", paths[0].parent)
                raise
    except safetensors.SafetensorError as e:   # its word for a full disk
        raise OSError(one_line(e)) from e


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
