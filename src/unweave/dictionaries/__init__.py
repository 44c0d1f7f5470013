"""Sparse dictionaries: one architecture a file."""

from unweave.dictionaries._base import Dictionary as Dictionary
from unweave.dictionaries._base import DictionaryConfig as DictionaryConfig
from unweave.dictionaries._base import Loss as Loss
from unweave.dictionaries._base import TrainingBatch as TrainingBatch
from unweave.dictionaries.abs_topk import AbsTopK as AbsTopK
from unweave.dictionaries.batch_topk import BatchTopK as BatchTopK
from unweave.dictionaries.jumprelu import JumpReLU as JumpReLU
from unweave.dictionaries.matryoshka import Matryoshka as Matryoshka
from unweave.dictionaries.registry import build as build
from unweave.dictionaries.registry import get as get
from unweave.dictionaries.registry import names as names
from unweave.dictionaries.registry import register as register
from unweave.dictionaries.relu import ReLU as ReLU
from unweave.dictionaries.standardised import StandardisedReLU as StandardisedReLU
from unweave.dictionaries.standardised import StandardisedTopK as StandardisedTopK
from unweave.dictionaries.topk import TopK as TopK
