"""Claims about the arithmetic of batches, chunks and units, for any sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.layout import HELD_OUT_SHARE, MIN_SEQUENCES, plan

SIZES = st.tuples(
    st.integers(MIN_SEQUENCES, 5000), st.sampled_from([8, 48, 256, 1024]), st.integers(1, 40), st.integers(16, 16384)
)


@given(SIZES)
def test_chunks_and_units_are_whole(sizes):
    layout = plan(*sizes)
    batch_rows = layout.batch * layout.context
    assert batch_rows % layout.chunk_rows == 0 or layout.chunk_rows % batch_rows == 0
    assert layout.unit_rows % layout.chunk_rows == 0
    assert layout.unit_sequences % layout.batch == 0
    assert layout.chunk_rows <= layout.n_rows // 32


@given(SIZES)
def test_every_row_is_in_exactly_one_unit_and_batch(sizes):
    layout = plan(*sizes)
    assert sum(len(layout.rows(unit)) for unit in range(layout.n_units)) == layout.n_rows
    sequences = [s for unit in range(layout.n_units) for batch in layout.batches(unit) for s in batch]
    assert sequences == list(range(layout.n_sequences))


@given(SIZES)
def test_held_out_is_the_end_at_least_five_percent_and_not_all(sizes):
    layout = plan(*sizes)
    held = [layout.held_out(unit) for unit in range(layout.n_units)]
    assert held == sorted(held) and any(held) and not all(held)
    assert layout.n_sequences - layout.train_sequences >= HELD_OUT_SHARE * layout.n_sequences


def test_too_little_text_is_said():
    with pytest.raises(ValueError, match="31 sequences of 256 tokens and at least 32 are needed"):
        plan(31, 256, 16, 128)


def test_sizes_of_a_known_case():
    # 1,871 sequences of 256 rows of 128 bytes: chunks of 3 batches (12,288 rows), the largest up to N/32 = 14,967
    layout = plan(1871, 256, 16, 128)
    assert (layout.chunk_rows, layout.unit_sequences, layout.n_units, layout.held_units) == (12288, 96, 20, 2)
