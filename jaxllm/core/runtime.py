"""The process's surroundings: cache folders and environment variables.

Nothing else in jaxllm reads the environment, so this page is the whole list of what it obeys.
Importing it costs nothing: no jax.
"""

import os
import stat
from pathlib import Path

from jaxllm.errors import CapacityError

__all__ = [
    "cache_dir",
    "data_dir",
    "hf_endpoint",
    "hf_offline",
    "models_dir",
    "programs_dir",
    "weights_dir",
    "xla_flags",
]


def cache_dir() -> Path:
    """The user's cache folder, made (mode 0700) if absent.

    `JAXLLM_CACHE`, else `$XDG_CACHE_HOME/jaxllm`, else `~/.cache/jaxllm`.

    Raises:
        CapacityError: the folder cannot be made or written to.
    """
    if own := os.environ.get("JAXLLM_CACHE"):
        return _writable(Path(own).expanduser().absolute())
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _writable(Path(base).expanduser().absolute() / "jaxllm")


def models_dir() -> Path:
    """Where pulled models are kept, one folder a catalogue name."""
    return _writable(cache_dir() / "models")


def weights_dir() -> Path:
    """Where weights in run layout are kept, keyed by the SHA-256 of their source."""
    return _writable(cache_dir() / "weights")


def data_dir() -> Path:
    """Where pulled data and tokenised shards are kept."""
    return _writable(cache_dir() / "data")


def programs_dir() -> Path:
    """Where compiled executables are kept. An executable is code: only its owner may write here.

    Raises:
        CapacityError: the folder belongs to somebody else, or cannot be made or written to.
    """
    path = _writable(cache_dir() / "programs")
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise CapacityError(
            f"{path} belongs to user {status.st_uid}, and stored programs are run as code; "
            "set JAXLLM_CACHE to a folder of your own"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(0o700)
    return path


def hf_endpoint() -> str | None:
    """The address of the Hugging Face hub if `HF_ENDPOINT` moves it, else None."""
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def hf_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` forbids asking the hub."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in {"1", "ON", "YES", "TRUE"} for value in values)


def xla_flags() -> str:
    """`XLA_FLAGS`, one space between words (order counts: the last of two equals wins)."""
    return " ".join(os.environ.get("XLA_FLAGS", "").split())


def _writable(path: Path) -> Path:
    try:
        # 0700 for every folder made on the way: mkdir's own `parents` ignores the mode.
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CapacityError(
            f"the cache folder {path} cannot be made ({error.strerror}); "
            "set JAXLLM_CACHE to a folder that can be written to"
        ) from error
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise CapacityError(
            f"the cache folder {path} cannot be written to; "
            "set JAXLLM_CACHE to a folder that can be written to"
        )
    return path
