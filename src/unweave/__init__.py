"""unweave takes the activations of any neural network apart into sparse features, and puts them to work.

>>> import unweave
>>> run = unweave.load("run/")                 # doctest: +SKIP
>>> tokens, code = run.encode("some text")     # doctest: +SKIP
>>> run.features[123]                          # doctest: +SKIP

This page is the public surface. Every name is imported when it is first used, so ``import unweave`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unweave.activations import ActivationStore as ActivationStore
    from unweave.activations import harvest as harvest
    from unweave.codes import SparseCode as SparseCode
    from unweave.dictionaries import Dictionary as Dictionary
    from unweave.dictionaries import build as build
    from unweave.dictionaries import register as register
    from unweave.errors import UnweaveError as UnweaveError
    from unweave.evaluation import evaluate as evaluate
    from unweave.features import FeatureStore as FeatureStore
    from unweave.formats import list_dictionaries as list_dictionaries
    from unweave.interventions import splice as splice
    from unweave.runs import Run as Run
    from unweave.runs import load as load
    from unweave.sources import ArraySource as ArraySource
    from unweave.sources import JoinedSource as JoinedSource
    from unweave.sources import LanguageModel as LanguageModel
    from unweave.sources import ModuleSource as ModuleSource
    from unweave.sources import TextSource as TextSource
    from unweave.sources import read_documents as read_documents
    from unweave.training import EndToEndConfig as EndToEndConfig
    from unweave.training import SparseDictionaryTransformer as SparseDictionaryTransformer
    from unweave.training import TrainingConfig as TrainingConfig
    from unweave.training import fit as fit
    from unweave.training import train as train
    from unweave.training import train_end_to_end as train_end_to_end
    from unweave.training import train_many as train_many

_HOME = {
    "ActivationStore": "activations",
    "ArraySource": "sources",
    "Dictionary": "dictionaries",
    "EndToEndConfig": "training",
    "FeatureStore": "features",
    "JoinedSource": "sources",
    "LanguageModel": "sources",
    "ModuleSource": "sources",
    "Run": "runs",
    "SparseCode": "codes",
    "SparseDictionaryTransformer": "training",
    "TextSource": "sources",
    "TrainingConfig": "training",
    "UnweaveError": "errors",
    "build": "dictionaries",
    "evaluate": "evaluation",
    "fit": "training",
    "harvest": "activations",
    "list_dictionaries": "formats",
    "load": "runs",
    "read_documents": "sources",
    "register": "dictionaries",
    "splice": "interventions",
    "train": "training",
    "train_end_to_end": "training",
    "train_many": "training",
}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unweave' has no attribute {name!r}")
    value = getattr(import_module(f"unweave.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
