"""Claims about the error measure, against cases worked out by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from cache.store import Block
from train.metrics import Fvu, evaluate
from train.modules import Output


def test_fvu_by_hand():
    # targets 0, 2, 4 (mean 2): variance sum 8; errors 1, 0, 1: 2/8
    fvu = Fvu()
    fvu.update(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [2.0]]))
    fvu.update(torch.tensor([[4.0]]), torch.tensor([[3.0]]))
    assert fvu.value() == pytest.approx(0.25) and fvu.rows == 3


def test_the_mean_has_fvu_1_and_a_constant_error_is_not_forgiven():
    y = torch.randn(100, 3) + 50
    mean, offset = Fvu(), Fvu()
    mean.update(y, y.mean(0).expand(100, 3))
    offset.update(y, y + 1)
    assert mean.value() == pytest.approx(1.0)
    assert offset.value() == pytest.approx((100 * 3 / (y - y.mean(0)).square().sum()).item(), rel=1e-4)


def test_blocks_do_not_matter():
    y, guess = torch.randn(90, 3), torch.randn(90, 3)
    whole, parts = Fvu(), Fvu()
    whole.update(y, guess)
    for start in range(0, 90, 7):
        parts.update(y[start : start + 7], guess[start : start + 7])
    assert parts.value() == pytest.approx(whole.value(), rel=1e-12)


def test_no_variance_is_not_a_number():
    fvu = Fvu()
    fvu.update(torch.ones(4, 2), torch.zeros(4, 2))
    assert math.isnan(fvu.value())


def test_l0_alive_and_dead_by_hand():
    codes = [torch.tensor([[1.0, 0, 0, 0], [1, 2, 0, 0]]), torch.tensor([[0, 3.0, 0, 0]])]

    class Fake(torch.nn.Module):
        def forward(self, x):
            return Output(x, codes[int(x[0, 0])])

    blocks = [
        Block(np.arange(len(c)), torch.full((len(c), 1), float(i)), torch.randn(len(c), 1)) for i, c in enumerate(codes)
    ]
    found = evaluate(Fake(), blocks)
    assert (found["l0"], found["alive"], found["dead_fraction"], found["rows"]) == (pytest.approx(4 / 3), 2, 0.5, 3)


def test_batches_read_training_rows_only_and_each_once_an_epoch(store):
    from train.batches import Batches

    allowed = Counter(tuple(x.tolist()) for block in store.blocks(1, held_out=False) for x in block.x)
    stream = Batches(store, 1, batch_size=64, seed=0).stream()
    n_batches = (
        int(0.7 * allowed.total()) // 64
    )  # a lane with one chunk less than the others begins its next epoch then
    seen = Counter(tuple(x.tolist()) for _ in range(n_batches) for x in next(stream)[0])
    assert seen <= allowed and seen.total() == 64 * n_batches


def test_inputs_and_outputs_stay_together(store):
    from train.batches import Batches

    x, y = next(Batches(store, 1, batch_size=100, seed=3).stream())
    assert x.shape == y.shape == (100, 16) and torch.allclose(store.mlp(1)(x), y, atol=1e-5)


@pytest.mark.parametrize("start", [1, 37, 200])
def test_the_stream_can_start_anywhere(store, start):
    from train.batches import Batches

    batches = Batches(store, 1, batch_size=100, seed=3)
    slow, fast = batches.stream(), batches.stream(start)
    for _ in range(start):
        next(slow)
    for _ in range(30):
        assert all(torch.equal(a, b) for a, b in zip(next(slow), next(fast), strict=True))


def test_a_small_buffer_still_reads_every_row_once(store, monkeypatch):
    from train import batches

    monkeypatch.setattr(batches, "BUFFER_BYTES", 1)
    stream = batches.Batches(store, 1, batch_size=64, seed=0).stream()
    allowed = Counter(tuple(x.tolist()) for block in store.blocks(1, held_out=False) for x in block.x)
    assert Counter(tuple(x.tolist()) for _ in range(100) for x in next(stream)[0]) <= allowed


def test_a_batch_of_many_sequences(store):
    """Mixing at write time and over whole chunks: a batch of 64 rows comes from nearly 64 sequences' worth of places."""
    from train.batches import Batches

    home = {
        tuple(x.tolist()): store.sequence[row]
        for b in store.blocks(1, False)
        for row, x in zip(b.rows, b.x, strict=True)
    }
    x, _ = next(Batches(store, 1, batch_size=64, seed=0).stream())
    assert len({home[tuple(row.tolist())] for row in x}) > 45
