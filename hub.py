"""One file of a checkpoint: from a folder, from the local cache, or from the Hugging Face Hub, in that order."""
import json
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.errors import RepositoryNotFoundError

WAYS_OUT = "download its files by hand and give --model FOLDER, or run once where the Hub can be reached (a proxy or " \
           "HF_ENDPOINT may help); a complete cached copy works without it, also under HF_HUB_OFFLINE=1"


def find(name_or_dir, filename, network=True):
    """Path of `filename` in a folder or Hub repository, or None if that exists but has no such file.

    The cache is asked before the network, so a second run contacts nobody; network=False never asks it. Raises
    OSError with one sentence that names the ways out when the folder, the repository or the network is not there.
    """
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder / filename if (folder / filename).is_file() else None
    if folder.exists():
        raise NotADirectoryError(f"{name_or_dir} is a file: give the folder that holds config.json and the weights")
    if folder.is_absolute() or str(name_or_dir).startswith((".", "~")) or str(name_or_dir).count("/") > 1:
        raise FileNotFoundError(f"there is no folder {name_or_dir}: give a checkpoint folder or a Hub name like "
                                "microsoft/deberta-v3-base")
    try:
        cached = try_to_load_from_cache(name_or_dir, filename)
        if cached is not None or not network:              # a path, or the marker for "known not to be there"
            return Path(cached) if isinstance(cached, str) else None
        return Path(hf_hub_download(name_or_dir, filename))
    except LocalEntryNotFoundError as e:                   # nothing cached, and no answer or not allowed to ask
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub could not be reached"
        raise OSError(f"{name_or_dir}/{filename} is not in the cache and {reason}: {WAYS_OUT}") from e
    except EntryNotFoundError:
        return None
    except GatedRepoError as e:
        raise OSError(f"{name_or_dir} is gated: accept its terms on the Hub and run `hf auth login`, "
                      f"or {WAYS_OUT}") from e
    except RepositoryNotFoundError as e:
        raise OSError(f"{name_or_dir} is neither a folder here nor a repository on the Hub that this account can "
                      f"read (check the spelling; `hf auth login` if it is private): {WAYS_OUT}") from e
    except HFValidationError as e:
        raise FileNotFoundError(f"{name_or_dir!r} is neither a folder nor a Hub name like microsoft/deberta-v3-base") from e
    except Exception as e:                                 # server errors, cut downloads, a full disk
        cause = " ".join(str(e).split())[:200] or type(e).__name__
        raise OSError(f"{name_or_dir}/{filename} did not arrive from the Hub ({cause}): try again, or {WAYS_OUT}") from e


def read_json(path):
    """The object in a JSON file; ValueError that names the file if it is not one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON ({e}): download it again") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: download it again")
    return content
