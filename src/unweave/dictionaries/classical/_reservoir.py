"""A uniform sample of the distinct rows of a stream, in buffers of fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LAST = 2**63 - 1  # sorts behind every key


class Reservoir(nn.Module):
    """The ``size`` rows with the smallest keys, where a row's key is a hash of its numbers.

    So the sample is uniform over distinct rows and depends neither on their order nor on how often they come by: a
    second pass over the data changes nothing. Equal rows count once.
    """

    kept: Tensor
    keys: Tensor
    n_kept: Tensor
    n_learnt: Tensor
    seed: Tensor

    def __init__(self, size: int, d: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("seed", torch.tensor(seed))  # of the hash; a resumed sample goes on with its own
        self.register_buffer("kept", torch.zeros(size, d))
        self.register_buffer("keys", torch.full((size,), _LAST))
        self.register_buffer("n_kept", torch.tensor(0))
        self.register_buffer("n_learnt", torch.tensor(0))

    def add(self, x: Tensor) -> None:
        """Offer ``(n, d)`` rows."""
        keys, order = _hash(x, int(self.seed)).sort(stable=True)
        new = torch.ones_like(keys, dtype=torch.bool)
        new[1:] = keys[1:] != keys[:-1]
        new &= (keys < self.keys.max()) & ~torch.isin(keys, self.keys)
        keys, order = keys[new], order[new]
        if len(keys) == 0:
            return
        size = len(self.keys)
        stays = torch.cat([self.keys, keys]).topk(size, largest=False, sorted=False).indices
        leaves = torch.ones(size, dtype=torch.bool, device=keys.device)
        leaves[stays[stays < size]] = False
        comes = stays[stays >= size] - size
        self.kept[leaves] = x[order[comes]].to(self.kept)
        self.keys[leaves] = keys[comes]
        self.n_kept.copy_((self.keys < _LAST).sum())

    def rows(self) -> Tensor:
        """``(n, d)``, sorted by key."""
        return self.kept[self.keys.argsort()[: int(self.n_kept)]]


def _hash(x: Tensor, seed: int) -> Tensor:
    """``(n,)`` int64 from 0, as good as random and the same for equal rows."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randint(-(2**62), 2**62, (x.shape[1],), generator=generator) * 2 + 1
    bits = x.float().contiguous().view(torch.int32).long()
    mixed = (bits * factors.to(bits.device)).sum(1)
    for factor in (
        -4658895280553007687,
        -7723592293110705685,
    ):  # splitmix64's: every bit of the sum reaches every other
        mixed = (mixed ^ (mixed >> 30 & 0x3FFFFFFFF)) * factor
    return (mixed ^ (mixed >> 31 & 0x1FFFFFFFF)) & _LAST
