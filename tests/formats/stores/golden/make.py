"""Lets the real libraries store activations and codes, and keeps their files with what the libraries read from them.

Run in an environment that has the libraries (any of them; the others' files are left alone)::

    python tests/formats/stores/golden/make.py [LIBRARY ...]

Every case is a folder ``LIBRARY/CASE`` with ``expected.safetensors`` beside the library's own files: what its own
reader gives back. Models are tiny and random; nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
D, T, VOCABULARY = 8, 6, 40


def place(library: str, case: str) -> Path:
    folder = HERE / library / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def keep(folder: Path, **tensors: Tensor) -> None:
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / "expected.safetensors")


def token_rows(n: int, t: int = T) -> Tensor:
    """``(n, t)`` ids; 0 is the BOS each begins with."""
    tokens = torch.randint(2, VOCABULARY, (n, t), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    return tokens


def absent(name: str, *attributes: str) -> None:
    """A stand-in for a module that is imported at the top and never used here."""
    try:
        __import__(name)
    except ImportError:
        made = sys.modules[name] = ModuleType(name)
        for attribute in attributes:
            setattr(made, attribute, type(attribute, (), {}))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)


# ---- SAELens: its runner over a tiny transformer, read as its ActivationsStore reads ------------------------------


def saelens() -> None:
    import datasets
    from sae_lens import cache_activations_runner as runner
    from sae_lens.config import CacheActivationsRunnerConfig
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=T, d_head=4, n_heads=2, d_vocab=VOCABULARY, act_fn="relu", device="cpu", seed=0
    )
    model = HookedTransformer(config)
    runner.load_model = lambda **_: model
    tokens = datasets.Dataset.from_dict({"input_ids": token_rows(14).tolist()})
    for case, dtype in (("float32", "float32"), ("float16", "float16")):
        folder = place("saelens", case)
        settings = CacheActivationsRunnerConfig(
            dataset_path="tiny/text", model_name="tiny", model_batch_size=2, hook_name="blocks.1.hook_resid_post",
            d_in=D, training_tokens=12 * T, context_size=T, new_cached_activations_path=str(folder), shuffle=False,
            dtype=dtype, device="cpu", streaming=False, buffer_size_gb=4 * T * D * getattr(torch, dtype).itemsize / 1e9,
            prepend_bos=False,
        )  # fmt: skip
        runner.CacheActivationsRunner(settings, override_dataset=tokens).run()
        reader = object.__new__(ActivationsStore)
        reader.cached_activations_path, reader.hook_name = str(folder), settings.hook_name
        reader.context_size, reader.d_in, reader.device, reader.dtype = T, D, torch.device("cpu"), None
        read = reader.load_cached_activation_dataset()
        found = {name: torch.stack([read[i][name] for i in range(len(read))]) for name in read.column_names}
        keep(folder, rows=found[settings.hook_name].float(), tokens=found["token_ids"].long())
    on_hub = place("saelens", "parquet")
    (on_hub / "data").mkdir()
    whole = datasets.load_from_disk(str(HERE / "saelens" / "float32"))
    whole.to_parquet(str(on_hub / "data" / "train-00000-of-00001.parquet"), batch_size=5)
    shutil.copy(HERE / "saelens" / "float32" / "expected.safetensors", on_hub)


# ---- saev 0.1.0 (newer ones are not on PyPI): its writer and its reader -------------------------------------------


def saev() -> None:
    absent("torchvision")
    absent("torchvision.datasets", "ImageFolder")
    from saev import activations, config

    generator = torch.Generator().manual_seed(0)
    for case, layers in (("one_layer", [11]), ("two_layers", [3, 11])):
        folder = place("saev", case)
        n, t = 7, T + 1  # always with a CLS token: this reader of theirs takes one for granted
        cache = torch.randn(n, len(layers), t, D, generator=generator)
        with tempfile.TemporaryDirectory() as temporary:
            pictures = Path(temporary) / "pictures"
            pictures.mkdir()
            for i in range(n):  # the library counts the files
                (pictures / f"{i}.png").touch()
            settings = config.Activations(
                data=config.ImageFolderDataset(root=str(pictures)), dump_to=str(Path(temporary) / "shards"),
                vit_ckpt="ViT-B-32/openai", vit_layers=layers, d_vit=D, n_patches_per_img=T, cls_token=True,
                n_patches_per_shard=3 * t * len(layers),
            )  # fmt: skip
            writer = activations.ShardWriter(settings)
            for a in range(0, n, 2):
                writer[a : min(a + 2, n)] = cache[a : a + 2]
            writer.flush()
            made = next((Path(temporary) / "shards").iterdir())
            metadata = json.loads((made / "metadata.json").read_text())
            (made / "metadata.json").write_text(json.dumps({**metadata, "data": "a folder of pictures"}) + "\n")
            found = {}
            for layer in layers:
                load = config.DataLoad(str(made), "patches", layer, scale_mean=False, scale_norm=False)
                read = activations.Dataset(load)
                found[f"rows.{layer}"] = torch.stack([read[i]["act"] for i in range(len(read))])
            shutil.copytree(made, folder, dirs_exist_ok=True)
        keep(folder, **found)


# ---- llamascopium: its writer and its loader ----------------------------------------------------------------------


def llamascopium() -> None:
    from llamascopium.activation.processors.activation import ActivationTransformer
    from llamascopium.activation.processors.cached_activation import CachedActivationLoader
    from llamascopium.activation.writer import ActivationWriter, ActivationWriterConfig

    hook = "blocks.1.hook_resid_post"
    generator = torch.Generator().manual_seed(0)
    tokens = token_rows(11)
    tokens[2, 4:] = tokens[9, 2:] = 1  # padding
    mask = ((tokens != 0) & (tokens != 1)).int()
    for case, dtype, format in (("bfloat16", torch.bfloat16, "safetensors"), ("pt", torch.float32, "pt")):
        folder = place("llamascopium", case)
        rows = torch.randn(11, T, D, generator=generator).to(dtype)
        samples = (
            {hook: rows[i], "tokens": tokens[i], "mask": mask[i], "attention_mask": mask[i],
             "meta": {"model_name": "tiny", "dataset_name": "tiny/text", "context_idx": i}}
            for i in range(11)
        )  # fmt: skip
        settings = ActivationWriterConfig(
            hook_points=[hook], cache_dir=str(folder), n_samples_per_chunk=4, format=format
        )
        ActivationWriter(settings).process(samples)
        loader = CachedActivationLoader({hook: folder / hook})
        kept = list(ActivationTransformer().process(loader.process()))
        keep(
            folder / hook,
            rows=torch.cat([d[hook] for d in kept]),
            tokens=torch.cat([d["tokens"] for d in kept]),
        )


# ---- delphi: its cache over a tiny Llama, read as its explainers read ----------------------------------------------


def delphi() -> None:
    absent("sentence_transformers", "SentenceTransformer")
    absent("faiss")
    from delphi.config import CacheConfig
    from delphi.latents.cache import LatentCache
    from delphi.latents.loader import TensorBuffer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    encoder = torch.randn(D, 50)

    def encode(x: Tensor) -> Tensor:
        made = (x.float() @ encoder).relu()
        values, at = made.topk(5, dim=-1)
        return torch.zeros_like(made).scatter(-1, at, values)

    raw = place("delphi", "raw")
    cache = LatentCache(model.model, {"layers.1": encode}, batch_size=4)
    cache.run(12 * 32, token_rows(12, 32))
    cache.save_splits(n_splits=3, save_dir=raw)
    settings = CacheConfig(
        dataset_repo="tiny/text", batch_size=4, cache_ctx_len=32, n_tokens=12 * 32, n_splits=3, dataset_split="train"
    )
    cache.save_config(raw, settings, "tiny")
    folder = raw / "layers.1"
    parts = [TensorBuffer(str(path), "layers.1").load() for path in sorted(folder.glob("*_*.safetensors"))]
    locations, activations = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    dense = torch.zeros(12, 32, 50).index_put_(tuple(locations.T), activations.float())
    keep(folder, code=dense.reshape(-1, 50).half(), tokens=parts[0][2])


LIBRARIES: dict[str, Callable[[], Any]] = {f.__name__: f for f in (saelens, saev, llamascopium, delphi)}

if __name__ == "__main__":
    for name in sys.argv[1:] or LIBRARIES:
        try:
            LIBRARIES[name]()
            print(f"{name}: made")
        except ImportError as error:
            print(f"{name}: left alone ({error})")
