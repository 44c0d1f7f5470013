"""Activations as data: the store on disk, the harvest that fills it, and the rows training reads."""

from unweave.activations.half_ring import HalfRing as HalfRing
from unweave.activations.harvest import harvest as harvest
from unweave.activations.ring import ShuffleRing as ShuffleRing
from unweave.activations.store import ActivationStore as ActivationStore
from unweave.activations.stream import Chunk as Chunk
from unweave.activations.stream import RowStream as RowStream
