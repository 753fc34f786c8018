"""Batches from the store, in an order that depends on the seed and nothing else.

Chunks are dealt to 8 lanes anew each epoch; a lane reads a group of its chunks, permutes the rows of the group and
hands them out slice by slice; a global batch is one slice of each lane. Rows were mixed across sequences when they
were written, so a group of whole chunks holds many sequences. Held-out rows are never read here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cache.store import LEFT_OUT, Store

LANES = 8
BUFFER_BYTES = 512 * 2**20  # of all lanes together; a store that is smaller is shuffled whole


@dataclass(frozen=True)
class Batches:
    """The stream of training batches of one layer."""

    store: Store
    layer: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        rows = sum(self._kept.values())
        if self.batch_size > rows // 2:
            raise ValueError(
                f"--batch-size is {self.batch_size} and {self.store.path} has {rows} training rows: choose at most {rows // 2}"
            )

    def stream(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) of batch `start` and all that follow, without end; both float32 (batch_size, d)."""
        sizes = [len(part) for part in np.array_split(np.arange(self.batch_size), self._n_lanes)]
        lanes = [self._lane(lane, size, start) for lane, size in enumerate(sizes)]
        while True:
            slices = [next(lane) for lane in lanes]
            yield torch.cat([x for x, _ in slices]), torch.cat([y for _, y in slices])

    @property
    def _n_lanes(self) -> int:
        return min(LANES, len(self.store.chunks(held_out=False)), self.batch_size)

    def _lane(self, lane: int, size: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Slices of `size` rows; the first `skip` are counted, not read. Rows short of a slice wait for the next epoch."""
        epoch = 0
        while True:
            for number, group in enumerate(self._groups(epoch, lane, size)):
                n_rows = sum(self._kept[chunk] for chunk in group)
                n_slices = n_rows // size
                if skip >= n_slices:
                    skip -= n_slices
                    continue
                order = np.random.default_rng([self.seed, epoch, lane, number]).permutation(n_rows)
                x, y = self._read(group, torch.from_numpy(order))
                for start in range(skip * size, n_slices * size, size):
                    yield x[start : start + size], y[start : start + size]
                skip = 0
            epoch += 1

    def _groups(self, epoch: int, lane: int, size: int) -> list[list[int]]:
        chunks = np.array(self.store.chunks(held_out=False))
        mine = np.random.default_rng([self.seed, epoch]).permutation(chunks)[lane :: self._n_lanes]
        mlp_width = sum(self.store.widths(self.layer))
        most = BUFFER_BYTES // self._n_lanes // (4 * mlp_width * self.store.layout.chunk_rows)
        # a group of fewer rows than a slice would give none, and its lane would never end an epoch with one
        least = -(-size // max(1, min(self._kept[chunk] for chunk in mine)))
        per_group = min(len(mine), max(1, most, least))
        return [mine[i : i + per_group].tolist() for i in range(0, len(mine), per_group)]

    @cached_property
    def _kept(self) -> dict[int, int]:
        """Rows of each training chunk that are not left out."""
        clean = (self.store.flags & LEFT_OUT) == 0
        return {chunk: int(clean[self.store.chunk_rows(chunk)].sum()) for chunk in self.store.chunks(held_out=False)}

    def _read(self, chunks: list[int], order: Tensor) -> tuple[Tensor, Tensor]:
        blocks = [self.store.block(self.layer, chunk) for chunk in chunks]
        return torch.cat([block.x for block in blocks])[order], torch.cat([block.y for block in blocks])[order]
