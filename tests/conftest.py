"""Fixtures several rooms share: a tiny language model with a real tokenizer, and a few hundred short documents."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny tensors gain nothing from threads, and on a shared machine threads that wait for each other cost a lot.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SUBJECTS = [
    "the cat",
    "a sailor",
    "my aunt",
    "the old king",
    "one engineer",
    "the small robot",
    "our teacher",
]
VERBS = ["sees", "paints", "forgets", "buys", "repairs", "sings about", "dreams of"]
OBJECTS = ["a red house", "the river", "two green apples", "the café", "an engine", "three letters", "snow ❄"]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """300 short documents made of a small grammar, with accents, an emoji and unequal lengths."""
    rng = random.Random(0)
    made = []
    for _ in range(300):
        sentences = [
            f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}." for _ in range(rng.randint(1, 12))
        ]
        made.append(" ".join(sentences))
    return made


@pytest.fixture(scope="session")
def corpus(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as a ``.jsonl`` file with a ``text`` field."""
    import json

    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 4-layer Llama (d 32) and a byte-level BPE tokenizer, as transformers saves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model as after a little more training: other weights from block 1 on, same tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(2)
    with torch.no_grad():
        for block in model.model.layers[1:]:
            for weight in block.parameters():
                weight.add_(0.3 * weight.std(correction=0) * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("tiny-tuned")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


TEMPLATE = """{% for turn in messages %}{% if turn.role not in ["system", "user", "assistant"] %}\
{{ raise_exception("no such role: " + turn.role) }}{% endif %}\
{{ "<|im_start|>" + turn.role + "\\n" + turn.content + "<|im_end|>" + "\\n" }}{% endfor %}"""


@pytest.fixture(scope="session")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 3-layer Llama and the tiny model's tokenizer with a chat template (ChatML) and padding."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "pad_token": "<pad>"})
    tokenizer.add_tokens(["user", "assistant", "system"])
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("tiny-chat")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chats(documents: list[str]) -> list[list[dict[str, str]]]:
    """120 dialogues of unequal lengths, made of the same sentences."""
    rng = random.Random(1)
    made = []
    for _ in range(120):
        turns = rng.sample(documents, 2 * rng.randint(1, 3))
        made.append([{"role": ("user", "assistant")[i % 2], "content": text[:90]} for i, text in enumerate(turns)])
    return made


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of the demo on few tokens: SmolLM2-135M, 20k activations. For tests marked ``real``."""
    import torch

    from unweave.errors import UnweaveError
    from unweave.sources import assets
    from unweave.workflows.demo import demo_recipe
    from unweave.workflows.pipeline import Pipeline

    try:
        assets.demo_model()
    except UnweaveError as error:
        pytest.skip(f"the demo's wheels cannot be fetched: {error}")
    recipe = demo_recipe(tokens=20_000)
    recipe = recipe.replace(evaluation=recipe.evaluation.replace(tokens=4096, loss_tokens=512, n_bootstrap=200))
    folder = tmp_path_factory.mktemp("demo") / "unweave-demo"
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        Pipeline(recipe, folder, say=lambda line: None).run()
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub of one's own, which huggingface_hub takes for the real one; its cache is empty, nobody is logged in."""
    from huggingface_hub import constants, file_download
    from tests.hub import Hub

    server = Hub(tmp_path / "hub")
    url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    known = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_OFFLINE": False}
    known |= {"HF_HUB_CACHE": str(tmp_path / "hub-cache"), "HF_TOKEN_PATH": str(tmp_path / "token")}
    for module in (constants, file_download):  # before version 1 the second had names of its own for them
        for name, value in known.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()
