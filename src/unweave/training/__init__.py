"""Training: the loop, checkpoints and resume, the health report, trackers, and ``fit`` for data in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unweave.training._end_to_end import EndToEndConfig as EndToEndConfig
from unweave.training.config import TrainingConfig as TrainingConfig
from unweave.training.end_to_end import check_end_to_end as check_end_to_end
from unweave.training.end_to_end import train_end_to_end as train_end_to_end
from unweave.training.fit import fit as fit
from unweave.training.health import health as health
from unweave.training.loop import Trained as Trained
from unweave.training.loop import train as train
from unweave.training.many import train_many as train_many
from unweave.training.metrics_log import read_metrics as read_metrics
from unweave.training.trackers import Tracker as Tracker

if TYPE_CHECKING:
    from unweave.training.estimator import SparseDictionaryTransformer as SparseDictionaryTransformer


def __getattr__(name: str) -> Any:
    # scikit-learn is an extra: only who asks for the transformer needs it.
    if name != "SparseDictionaryTransformer":
        raise AttributeError(f"module 'unweave.training' has no attribute {name!r}")
    try:
        from unweave.training.estimator import SparseDictionaryTransformer
    except ModuleNotFoundError as error:
        from unweave.errors import UnweaveError

        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise UnweaveError("the transformer needs scikit-learn: pip install 'unweave[sklearn]'") from None
    return SparseDictionaryTransformer
