"""AuxK: dead features learn to explain what the living ones leave over (Gao et al. 2024, §2.4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from unweave.dictionaries._linear import LinearDictionary
from unweave.kernels.autograd import sparse_decode
from unweave.kernels.select.reference import select_topk


def auxk_loss(
    dictionary: LinearDictionary,
    x: Tensor,
    residual: Tensor,
    dead: Tensor | None,
    k_aux: int,
    *,
    signed: bool = False,
) -> Tensor:
    """How badly the ``k_aux`` strongest dead features of each row explain the residual, as a share of its variance.

    Only the dead features are gathered and multiplied, so the cost follows their number.

    Args:
        x: ``(n, d_in)`` input. residual: ``(n, d_out)``, target minus reconstruction (no gradient flows into it).
        dead: ``(n_features,)`` boolean, or None.
        signed: strongest by magnitude, with values of either sign.
    """
    at = dead.nonzero().squeeze(1) if dead is not None else None
    if at is None or len(at) == 0:
        return residual.new_zeros(())
    residual = residual.detach()
    W_enc, b_enc, W_dec = dictionary.W_enc[at], dictionary.b_enc[at], dictionary.W_dec[at]
    scores = F.linear(dictionary.centre(x).detach(), W_enc, b_enc)
    strength = scores.detach().abs() if signed else scores.detach()
    pattern = select_topk(strength, min(k_aux, len(at)))
    values = scores.reshape(-1)[pattern.flat]
    values = values if signed else F.relu(values)
    error = (residual - sparse_decode(values, W_dec, pattern)).square().sum()
    variance = (residual - residual.mean(0)).square().sum()
    return (error / variance.clamp_min(1e-12)).nan_to_num(0.0)
