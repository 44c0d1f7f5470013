"""Sparse dictionaries: one architecture a file.

A file is imported when its architecture, or a name from it, is first used: there are many.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unweave.dictionaries._base import Dictionary as Dictionary
from unweave.dictionaries._base import DictionaryConfig as DictionaryConfig
from unweave.dictionaries._base import Loss as Loss
from unweave.dictionaries._base import TrainingBatch as TrainingBatch
from unweave.dictionaries.registry import build as build
from unweave.dictionaries.registry import get as get
from unweave.dictionaries.registry import names as names
from unweave.dictionaries.registry import register as register

if TYPE_CHECKING:
    from unweave.dictionaries.abs_topk import AbsTopK as AbsTopK
    from unweave.dictionaries.batch_abs_topk import BatchAbsTopK as BatchAbsTopK
    from unweave.dictionaries.batch_topk import BatchTopK as BatchTopK
    from unweave.dictionaries.classical import ICA as ICA
    from unweave.dictionaries.classical import NMF as NMF
    from unweave.dictionaries.classical import PCA as PCA
    from unweave.dictionaries.classical import Archetypal as Archetypal
    from unweave.dictionaries.classical import KMeans as KMeans
    from unweave.dictionaries.classical import RandomDirections as RandomDirections
    from unweave.dictionaries.classical import SklearnDictionary as SklearnDictionary
    from unweave.dictionaries.clt import CrossLayerTranscoder as CrossLayerTranscoder
    from unweave.dictionaries.clt import SkipCrossLayerTranscoder as SkipCrossLayerTranscoder
    from unweave.dictionaries.crosscoder import BatchTopKCrosscoder as BatchTopKCrosscoder
    from unweave.dictionaries.crosscoder import Crosscoder as Crosscoder
    from unweave.dictionaries.crosscoder import ModelDiff as ModelDiff
    from unweave.dictionaries.crosscoder import TopKCrosscoder as TopKCrosscoder
    from unweave.dictionaries.crosscoder import model_diff as model_diff
    from unweave.dictionaries.crosscoder import relative_norms as relative_norms
    from unweave.dictionaries.feature_choice import FeatureChoice as FeatureChoice
    from unweave.dictionaries.g_sae import GSAE as GSAE
    from unweave.dictionaries.gated import Gated as Gated
    from unweave.dictionaries.gba import GBA as GBA
    from unweave.dictionaries.glu import GLU as GLU
    from unweave.dictionaries.group_max import GroupMax as GroupMax
    from unweave.dictionaries.hierarchical_topk import HierarchicalTopK as HierarchicalTopK
    from unweave.dictionaries.inference import pursue as pursue
    from unweave.dictionaries.itda import ITDA as ITDA
    from unweave.dictionaries.jumprelu import JumpReLU as JumpReLU
    from unweave.dictionaries.matryoshka import Matryoshka as Matryoshka
    from unweave.dictionaries.matryoshka import MatryoshkaJumpReLU as MatryoshkaJumpReLU
    from unweave.dictionaries.matryoshka import MatryoshkaTopK as MatryoshkaTopK
    from unweave.dictionaries.mp import MP as MP
    from unweave.dictionaries.multi_topk import MultiTopK as MultiTopK
    from unweave.dictionaries.mutual_choice import MutualChoice as MutualChoice
    from unweave.dictionaries.omp import OMP as OMP
    from unweave.dictionaries.ort import Ort as Ort
    from unweave.dictionaries.p_anneal import PAnneal as PAnneal
    from unweave.dictionaries.poly import PolyBatchTopK as PolyBatchTopK
    from unweave.dictionaries.poly import PolyMatryoshka as PolyMatryoshka
    from unweave.dictionaries.poly import PolyTopK as PolyTopK
    from unweave.dictionaries.relu import ReLU as ReLU
    from unweave.dictionaries.standardised import StandardisedAbsTopK as StandardisedAbsTopK
    from unweave.dictionaries.standardised import StandardisedGated as StandardisedGated
    from unweave.dictionaries.standardised import StandardisedJumpReLU as StandardisedJumpReLU
    from unweave.dictionaries.standardised import StandardisedReLU as StandardisedReLU
    from unweave.dictionaries.standardised import StandardisedTopK as StandardisedTopK
    from unweave.dictionaries.switch import Switch as Switch
    from unweave.dictionaries.temporal import Temporal as Temporal
    from unweave.dictionaries.top_afa import TopAFA as TopAFA
    from unweave.dictionaries.topk import TopK as TopK
    from unweave.dictionaries.transcoder import AbsTopKSkipTranscoder as AbsTopKSkipTranscoder
    from unweave.dictionaries.transcoder import GroupMaxSkipTranscoder as GroupMaxSkipTranscoder
    from unweave.dictionaries.transcoder import JumpReLUSkipTranscoder as JumpReLUSkipTranscoder
    from unweave.dictionaries.transcoder import SkipTranscoder as SkipTranscoder
    from unweave.dictionaries.transcoder import Transcoder as Transcoder
    from unweave.dictionaries.vsae import VSAE as VSAE

_HOME = {
    "AbsTopK": "abs_topk",
    "AbsTopKSkipTranscoder": "transcoder",
    "Archetypal": "classical",
    "BatchAbsTopK": "batch_abs_topk",
    "BatchTopK": "batch_topk",
    "BatchTopKCrosscoder": "crosscoder",
    "CrossLayerTranscoder": "clt",
    "Crosscoder": "crosscoder",
    "FeatureChoice": "feature_choice",
    "GBA": "gba",
    "GLU": "glu",
    "GSAE": "g_sae",
    "Gated": "gated",
    "GroupMax": "group_max",
    "GroupMaxSkipTranscoder": "transcoder",
    "HierarchicalTopK": "hierarchical_topk",
    "ICA": "classical",
    "ITDA": "itda",
    "JumpReLU": "jumprelu",
    "JumpReLUSkipTranscoder": "transcoder",
    "KMeans": "classical",
    "MP": "mp",
    "Matryoshka": "matryoshka",
    "MatryoshkaJumpReLU": "matryoshka",
    "MatryoshkaTopK": "matryoshka",
    "ModelDiff": "crosscoder",
    "MultiTopK": "multi_topk",
    "MutualChoice": "mutual_choice",
    "NMF": "classical",
    "OMP": "omp",
    "Ort": "ort",
    "PAnneal": "p_anneal",
    "PCA": "classical",
    "PolyBatchTopK": "poly",
    "PolyMatryoshka": "poly",
    "PolyTopK": "poly",
    "RandomDirections": "classical",
    "ReLU": "relu",
    "SkipCrossLayerTranscoder": "clt",
    "SkipTranscoder": "transcoder",
    "SklearnDictionary": "classical",
    "StandardisedAbsTopK": "standardised",
    "StandardisedGated": "standardised",
    "StandardisedJumpReLU": "standardised",
    "StandardisedReLU": "standardised",
    "StandardisedTopK": "standardised",
    "Switch": "switch",
    "Temporal": "temporal",
    "TopAFA": "top_afa",
    "TopK": "topk",
    "TopKCrosscoder": "crosscoder",
    "Transcoder": "transcoder",
    "VSAE": "vsae",
    "model_diff": "crosscoder",
    "pursue": "inference",
    "relative_norms": "crosscoder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unweave.dictionaries' has no attribute {name!r}")
    value = getattr(import_module(f"unweave.dictionaries.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
