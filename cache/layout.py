"""Where each row goes: batches, chunks and units, all fixed by arithmetic before the first byte is written.

forward batch   `batch` sequences; its rows are permuted among themselves
chunk           what a reader reads: divides a batch's rows or is a multiple of them, about 8 MiB, at most N/32
unit            what a writer commits: whole chunks and whole batches, about min(256 MiB, N/16); one shard of each array
held out        the last whole units, at least 5 % of the rows
"""

import math
from dataclasses import dataclass, replace

MIB = 2**20
CHUNK_BYTES, UNIT_BYTES = 8 * MIB, 256 * MIB  # 4-16 MiB chunks read fastest; below 2 MiB per-call overhead rules
HELD_OUT_SHARE = 0.05
MIN_SEQUENCES = 32  # below this N/32 would be less than one sequence


@dataclass(frozen=True)
class Layout:
    n_sequences: int
    context: int
    batch: int  # sequences per forward pass
    chunk_rows: int
    unit_sequences: int
    held_units: int

    @property
    def n_rows(self) -> int:
        return self.n_sequences * self.context

    @property
    def unit_rows(self) -> int:
        return self.unit_sequences * self.context

    @property
    def n_units(self) -> int:
        return math.ceil(self.n_sequences / self.unit_sequences)

    @property
    def train_sequences(self) -> int:
        return (self.n_units - self.held_units) * self.unit_sequences

    def held_out(self, unit: int) -> bool:
        return unit >= self.n_units - self.held_units

    def rows(self, unit: int) -> range:
        return range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.n_rows))

    def batches(self, unit: int) -> list[range]:
        """The sequences of each forward batch of a unit."""
        stop = min((unit + 1) * self.unit_sequences, self.n_sequences)
        starts = range(unit * self.unit_sequences, stop, self.batch)
        return [range(start, min(start + self.batch, stop)) for start in starts]


def plan(n_sequences: int, context: int, batch: int, row_bytes: int) -> Layout:
    """The layout of `n_sequences`; `row_bytes` is the size of one row of the widest array.

    A small text gets a smaller forward batch than asked for, so that at least 16 units exist.
    """
    if n_sequences < MIN_SEQUENCES:
        raise ValueError(
            f"the text gives {n_sequences} sequences of {context} tokens and at least {MIN_SEQUENCES} are needed: "
            "give more text, more --tokens or a smaller --context"
        )
    batch = min(batch, max(1, n_sequences // 16))
    n_rows, batch_rows = n_sequences * context, batch * context
    chunk_rows = _nearest(_divisors_and_multiples(batch_rows, n_rows // 32), CHUNK_BYTES / row_bytes)
    step = math.lcm(chunk_rows, batch_rows)
    unit_rows = step * max(1, round(min(UNIT_BYTES / row_bytes, n_rows / 16) / step))
    return with_sequences(Layout(n_sequences, context, batch, chunk_rows, unit_rows // context, 0), n_sequences)


def with_sequences(layout: Layout, n_sequences: int) -> Layout:
    """The same sizes for another number of sequences, with the held-out share counted anew."""
    layout = replace(layout, n_sequences=n_sequences)
    held = 1
    while (
        sum(len(layout.rows(u)) for u in range(layout.n_units - held, layout.n_units)) < HELD_OUT_SHARE * layout.n_rows
    ):
        held += 1
    return replace(layout, held_units=held)


def _divisors_and_multiples(batch_rows: int, most: int) -> list[int]:
    divisors = [r for r in range(1, batch_rows + 1) if batch_rows % r == 0]
    return [r for r in divisors if r <= most] + list(range(2 * batch_rows, most + 1, batch_rows))


def _nearest(candidates: list[int], target: float) -> int:
    return min(candidates, key=lambda rows: abs(math.log(rows / target)))
