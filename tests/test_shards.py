"""Claims about shard files: plain zarr-python reads them, and no damage is read as data."""

import json

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from cache.shards import ALIGN, DamagedStore, ShardWriter, read_chunk, read_index

ROWS, CHUNK, D = 44, 8, 3  # 6 chunks, the last one half full


@pytest.fixture
def array(tmp_path):
    return zarr.create_array(
        tmp_path / "a", shape=(ROWS, D), shards=(48, D), chunks=(CHUNK, D), dtype="<f4", fill_value=np.nan,
        compressors=[Crc32cCodec()], filters=None,
    )  # fmt: skip


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(ROWS, D)).astype("<f4")


@pytest.fixture
def shard(array, values, tmp_path):
    """Written in pieces of 5 rows, which divide no chunk."""
    path = tmp_path / "a" / "c" / "0" / "0"
    writer = ShardWriter(path, chunk_rows=CHUNK, n_chunks=6, fill=np.float32("nan"))
    for start in range(0, ROWS, 5):
        writer.append(values[start : start + 5])
    assert writer.close()["size"] == path.stat().st_size
    return path


def read(path, chunk):
    rows = np.empty((CHUNK, D), dtype="<f4")
    read_chunk(path, read_index(path, 6), chunk, memoryview(rows).cast("B"))
    return rows


def test_zarr_python_reads_every_byte(array, shard, values):
    assert array[:].tobytes() == values.tobytes()


def test_direct_reader_gives_the_same(shard, values):
    got = np.concatenate([read(shard, chunk) for chunk in range(6)])
    assert got[:ROWS].tobytes() == values.tobytes() and np.isnan(got[ROWS:]).all()


def test_chunks_start_at_page_boundaries(shard):
    assert (read_index(shard, 6)[:, 0] % ALIGN == 0).all()


def test_nothing_under_the_name_until_closed(tmp_path):
    writer = ShardWriter(tmp_path / "s", chunk_rows=2, n_chunks=1, fill=np.float32(0))
    writer.append(np.zeros((2, 1), dtype="<f4"))
    assert not (tmp_path / "s").exists()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("position", [20, ALIGN + 5, -10])
def test_one_flipped_bit_is_found(shard, position):
    data = bytearray(shard.read_bytes())
    data[position] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedStore, match="damaged: make the store anew with"):
        [read(shard, chunk) for chunk in range(6)]


@pytest.mark.parametrize("length", [0, 3, 1000])
def test_a_truncated_shard_is_found(shard, length):
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(DamagedStore):
        read(shard, 0)


def test_a_missing_shard_is_found(shard, store):
    shard.unlink()
    with pytest.raises(DamagedStore, match="is missing"):
        read(shard, 0)
    (store.path / "layers/1/input/c/0/0").unlink()
    with pytest.raises(DamagedStore, match="is missing"):
        store.block(1, 0)


def test_markers_hold_what_the_files_are(store):
    marker = json.loads((store.path / "units/0.json").read_text())
    for name, file in marker["files"].items():
        path = store.path / name / "c" / ("0/0" if name.startswith("layers") else "0")
        assert path.stat().st_size == file["size"]
