"""Activations as proximal steps: each penalty on codes has one, and it is the encoder of a known architecture.

A dictionary learner minimises ``1/2 ||x - (z W_dec + b)||^2 + R(z)`` over z. One proximal gradient step of length 1
from z = 0, with W_dec^T untied into an encoder and the rest into its bias, is ``z = prox_R(u)``, where

    prox_R(u) = argmin_z 1/2 ||z - u||^2 + R(z).

============================================  ===============================  ==========================
R(z)                                          prox                             architecture
============================================  ===============================  ==========================
``lambda ||z||_1``, z >= 0                    ``max(u - lambda, 0)``           ReLU (lambda in the bias)
``lambda ||z||_0``, z >= 0                    ``u 1[u > sqrt(2 lambda)]``      JumpReLU
``||z||_0 <= k``, z >= 0                      ReLU of the k largest            TopK
``||z||_0 <= k``                              the k largest by magnitude       AbsTopK
``lambda ||z||_0``                            ``u 1[|u| > sqrt(2 lambda)]``    two-sided JumpReLU
============================================  ===============================  ==========================

(Zhu, Khalili, Zhu 2026, AbsTopK, ICLR.) Functions here are dense and for analysis; the architectures have their own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def prox_l1_nonnegative(u: Tensor, penalty: float) -> Tensor:
    """Of ``penalty ||z||_1`` with z >= 0: ReLU."""
    return F.relu(u - penalty)


def prox_l0_nonnegative(u: Tensor, penalty: float) -> Tensor:
    """Of ``penalty ||z||_0`` with z >= 0: JumpReLU with the threshold ``sqrt(2 penalty)``."""
    return u * (u > (2 * penalty) ** 0.5)


def prox_l0(u: Tensor, penalty: float) -> Tensor:
    """Of ``penalty ||z||_0``: JumpReLU on both sides."""
    return u * (u.abs() > (2 * penalty) ** 0.5)


def prox_cardinality_nonnegative(u: Tensor, k: int) -> Tensor:
    """Of ``||z||_0 <= k`` with z >= 0, over the last dimension: TopK."""
    kept = u.topk(k, dim=-1)
    return u.new_zeros(u.shape).scatter(-1, kept.indices, F.relu(kept.values))


def prox_cardinality(u: Tensor, k: int) -> Tensor:
    """Of ``||z||_0 <= k``, over the last dimension: AbsTopK."""
    kept = u.abs().topk(k, dim=-1).indices
    return u.new_zeros(u.shape).scatter(-1, kept, u.gather(-1, kept))
