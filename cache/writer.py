"""Writing a store: all metadata first, then unit after unit, then the mark that it is complete."""

import json
from pathlib import Path

import numpy as np
import torch
import zarr
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from zarr.codecs import Crc32cCodec

from .layout import Layout
from .shards import ShardWriter, write_file
from .store import DISK_DTYPES, FILLS, LEFT_OUT, ROW_FIELDS, SIDES, digest, from_disk, markers_digest, shard_of


def to_disk(tensor: Tensor, dtype: str) -> np.ndarray:
    """Cast to the storage dtype; bfloat16 comes back as its bits."""
    tensor = tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
    return tensor.view(torch.uint16).numpy() if dtype == "bfloat16" else tensor.numpy()


def create(path: Path, attributes: dict, layout: Layout, widths: dict[int, tuple[int, int]], tokens: tuple) -> None:
    """Create the arrays and write the tokens: all metadata, by one process, before any unit.

    `widths` gives (d_in, d_out) per layer, `tokens` the ids and document numbers, both (n_seq, context).
    """
    dtype = attributes["dtype"]
    root = zarr.create_group(path, zarr_format=3, attributes=attributes)
    sizes = {"shape": layout.n_rows, "shards": layout.unit_rows}
    for layer, sides in widths.items():
        for side, d in zip(SIDES, sides, strict=True):
            array = _create(
                root, f"layers/{layer}/{side}", sizes, layout.chunk_rows, d, DISK_DTYPES[dtype], FILLS[dtype]
            )
            array.attrs.update({"logical_dtype": dtype, "layer": layer, "side": side})
    for name, kind in ROW_FIELDS.items():
        _create(root, f"rows/{name}", sizes, layout.unit_rows, None, np.dtype(kind), 0)
    for name, values in zip(("ids", "doc"), tokens, strict=True):
        array = root.create_array(
            f"tokens/{name}", shape=values.shape, dtype=values.dtype, chunks=values.shape, filters=None,
            compressors=[Crc32cCodec()], config={"write_empty_chunks": True},
        )  # fmt: skip
        array[:] = values
    for folder in ("units", "weights"):
        (path / folder).mkdir()


def _create(root: zarr.Group, name: str, sizes: dict, chunk: int, d: int | None, dtype: np.dtype, fill) -> zarr.Array:
    tail = () if d is None else (d,)
    return root.create_array(
        name, shape=(sizes["shape"], *tail), shards=(sizes["shards"], *tail), chunks=(chunk, *tail), dtype=dtype,
        fill_value=fill, filters=None, compressors=[Crc32cCodec()], config={"write_empty_chunks": True},
    )  # fmt: skip


class UnitWriter:
    """Writes one unit: rows into a shard of every array, and at the end the marker that makes them count."""

    def __init__(self, path: Path, unit: int, layout: Layout, layers: list[int], dtype: str) -> None:
        self.path, self.unit, self.rows, self.dtype = path, unit, 0, dtype
        n_chunks, self.sums = layout.unit_rows // layout.chunk_rows, {}
        self.shards: dict[str, ShardWriter] = {}
        for name in [f"layers/{layer}/{side}" for layer in layers for side in SIDES]:
            file = path / shard_of(name, unit)
            self.shards[name] = ShardWriter(file, chunk_rows=layout.chunk_rows, n_chunks=n_chunks, fill=FILLS[dtype])
        for field, kind in ROW_FIELDS.items():
            file = path / shard_of(f"rows/{field}", unit)
            fill = np.dtype(kind).type(0)
            self.shards[f"rows/{field}"] = ShardWriter(file, chunk_rows=layout.unit_rows, n_chunks=1, fill=fill)

    def append(self, rows: dict[str, np.ndarray], activations: dict[str, np.ndarray]) -> None:
        """One forward batch: `rows` by field name, `activations` by array name, in the same row order."""
        for field, values in rows.items():
            self.shards[f"rows/{field}"].append(values.astype(ROW_FIELDS[field]))
        clean = (rows["flags"] & LEFT_OUT) == 0
        self.rows += len(clean)
        self._add("count", torch.tensor(float(clean.sum()), dtype=torch.float64))
        for name, values in activations.items():
            self.shards[name].append(values)
            kept = from_disk(torch.from_numpy(values), self.dtype).double()[torch.from_numpy(clean)]
            self._add(f"{name}/sum", kept.sum(0))
            self._add(f"{name}/sum_of_squares", kept.square().sum(0))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def commit(self, *, held_out: bool, seed: list[int]) -> None:
        """Put every file of the unit on the disk, then the marker that makes them count."""
        files = {name: shard.close() for name, shard in self.shards.items()}
        statistics = save_tensors(self.sums)
        write_file(self.path / f"units/{self.unit}.safetensors", statistics)
        marker = {"unit": self.unit, "rows": self.rows, "held_out": held_out, "seed": seed, "files": files}
        marker["statistics_sha256"] = digest(statistics)
        write_file(self.path / f"units/{self.unit}.json", json.dumps(marker, indent=1).encode())

    def abandon(self) -> None:
        for shard in self.shards.values():
            shard.abandon()


def marked_units(path: Path) -> set[int]:
    """Units that are completely written: marker and statistics are there."""
    return {int(file.stem) for file in (path / "units").glob("*.json") if file.with_suffix(".safetensors").is_file()}


def finalize(path: Path, layout: Layout) -> None:
    """Merge the statistics of all units (training units only) and declare the store complete."""
    merged: dict[str, Tensor] = {}
    for unit in range(layout.n_units - layout.held_units):
        for name, value in load_tensors((path / f"units/{unit}.safetensors").read_bytes()).items():
            merged[name] = merged[name] + value if name in merged else value
    complete = {
        "units": layout.n_units,
        "markers_sha256": markers_digest([path / f"units/{unit}.json" for unit in range(layout.n_units)]),
        "weights_sha256": {file.name: digest(file.read_bytes()) for file in sorted((path / "weights").iterdir())},
        "statistics": {name: merged[name].tolist() for name in sorted(merged)},
    }
    write_file(path / "_COMPLETE.json", json.dumps(complete).encode())
