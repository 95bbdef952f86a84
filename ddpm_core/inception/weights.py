"""Where the weights of the FID network are: a path, an environment variable, torch's cache, or a download."""

import os
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path

from ddpm_core.commit import committed_file, sha256_file
from ddpm_core.errors import InputError

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
WEIGHTS_SHA256_PREFIX = "6726825d"  # the file's name carries it
WEIGHTS_VARIABLE = "DDPM_INCEPTION_WEIGHTS"
FEATURES, CLASSES = 2048, 1008  # of the network that the file is of
_CACHED_NAMES = (WEIGHTS_NAME, "weights-inception-2015-12-05-6726825d.pth")  # pytorch-fid's, torch-fidelity's
_TIMEOUT_S = 10.0  # of each network operation


def find_inception_weights(path: Path | None = None) -> Path:
    """The FID network's weight file: `path`, else what DDPM_INCEPTION_WEIGHTS names, else the file of
    pytorch-fid or torch-fidelity in torch's cache (`torch_hub()/checkpoints`), else a download of
    95 MB into that cache.

    A file that the user names is taken as it is; one in the cache must have the published sha256. Raises
    InputError if the named file does not exist, the cached one is corrupt or the download fails.
    """
    named = os.environ.get(WEIGHTS_VARIABLE)
    if path is None and named:
        path = Path(named)
    if path is not None:
        if not path.is_file():
            raise InputError(
                f"the Inception weights {str(path)!r} are not a file: give the path of {WEIGHTS_NAME!r} "
                f"(from {WEIGHTS_URL}), or none and an unset {WEIGHTS_VARIABLE} to use torch's cache"
            )
        return path

    cache = torch_hub() / "checkpoints"
    for name in _CACHED_NAMES:
        cached = cache / name
        if cached.is_file():
            digest = sha256_file(cached)
            if not digest.startswith(WEIGHTS_SHA256_PREFIX):
                raise InputError(
                    f"the Inception weights {str(cached)!r} are damaged (their sha256 begins {digest[:8]}, "
                    f"not {WEIGHTS_SHA256_PREFIX}): delete the file to have it downloaded again"
                )
            return cached
    return _download(cache / WEIGHTS_NAME)


def torch_hub() -> Path:
    """Where torch.hub keeps files, which is known without torch."""
    home = os.environ.get("TORCH_HOME", f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/torch")
    return Path(home).expanduser() / "hub"


def _download(target: Path) -> Path:
    try:
        with committed_file(target) as temporary:
            # Not torch.hub's download, which has no timeout: behind a firewall it would wait for ever.
            with urllib.request.urlopen(WEIGHTS_URL, timeout=_TIMEOUT_S) as response, temporary.open("wb") as file:
                shutil.copyfileobj(response, file)
            digest = sha256_file(temporary)
            if not digest.startswith(WEIGHTS_SHA256_PREFIX):
                raise OSError(f"what arrived has a sha256 of {digest[:8]}..., not {WEIGHTS_SHA256_PREFIX}...")
    except (OSError, HTTPException) as error:
        raise InputError(
            f"the Inception weights {target.name!r} are not on this machine and could not be downloaded "
            f"({error}): fetch {WEIGHTS_URL} and put it at {str(target)!r}, or name it with "
            f"{WEIGHTS_VARIABLE}"
        ) from error
    return target
