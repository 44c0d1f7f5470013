"""The classical rivals behind the same interface: they learn from a sample of rows, without gradients."""

from unweave.dictionaries.classical.archetypal import Archetypal as Archetypal
from unweave.dictionaries.classical.ica import ICA as ICA
from unweave.dictionaries.classical.kmeans import KMeans as KMeans
from unweave.dictionaries.classical.nmf import NMF as NMF
from unweave.dictionaries.classical.pca import PCA as PCA
from unweave.dictionaries.classical.random import RandomDirections as RandomDirections
from unweave.dictionaries.classical.sklearn_dictionary import SklearnDictionary as SklearnDictionary
