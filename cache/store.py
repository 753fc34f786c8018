"""The store, schema 1: one folder that stages two and three need nothing besides.

    store.zarr/layers/<L>/{input,output}       [N, d]   float16 | float32 | uint16 that means bfloat16
               rows/{seq,pos,flags}            [N]      row -> sequence, position, flag bits
               tokens/{ids,doc}                [n_seq, context]
               weights/<L>.safetensors         the MLP; head.safetensors: embedding, unembedding, final norm
               tokenizer/                      as transformers saves it
               units/<id>.json, .safetensors   commit marker; float64 sums of the unit
               _COMPLETE.json                  count and digest of the markers, merged statistics

A unit exists completely or not at all: its shards are on the disk under their names before its marker is.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import zarr
from torch import Tensor

from . import weights
from .config import spell
from .layout import Layout
from .shards import DamagedStore, read_chunk, read_index

SCHEMA = 1
NAME = "store.zarr"
SIDES = ("input", "output")
ROW_FIELDS = {"seq": "uint32", "pos": "uint16", "flags": "uint8"}
BOS, SPECIAL, PAD, SINK, HELD_OUT = (1 << bit for bit in range(5))
LEFT_OUT = BOS | SPECIAL | PAD | SINK  # rows that no statistic, no training batch and no metric reads

# bfloat16 has no Zarr type: its bits are stored as uint16, and the fill value is a NaN of each format
DISK_DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}
FILLS = {"float16": np.float16("nan"), "float32": np.float32("nan"), "bfloat16": np.uint16(0x7FC0)}

MEND_BY_HAND = "restore it, or delete the folder it lies in and run the command that made it"  # it may not be ours


def read_json(path: Path) -> dict:
    """A JSON object that we wrote; DamagedStore names the file if it is none."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, FileNotFoundError) as error:
        raise DamagedStore(f"{path} is missing or not JSON ({error}): {MEND_BY_HAND}") from error
    if not isinstance(found, dict):
        raise DamagedStore(f"{path} holds no JSON object: {MEND_BY_HAND}")
    return found


def digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def locate(path: Path) -> Path:
    """The store at `path`, which may be the store itself or the folder that holds it."""
    path = Path(path)
    for candidate in (path, path / NAME):
        if (candidate / "zarr.json").is_file():
            return candidate
    raise FileNotFoundError(f"no store at {path}: make one with `cli cache --out {path}`, or name another folder")


def read_attributes(path: Path) -> dict:
    """The root attributes; ValueError if this is not a store of this schema."""
    attributes = read_json(path / "zarr.json").get("attributes", {})
    schema = attributes.get("expanse_schema")
    if schema is None:
        raise ValueError(f"{path} is a Zarr group but not an Expanse store: name another folder")
    if schema != SCHEMA:
        raise ValueError(f"{path} has store schema {schema} and this version reads {SCHEMA}: cache it again")
    return attributes


def from_disk(tensor: Tensor, dtype: str) -> Tensor:
    """Undo `to_disk`: the bits of bfloat16 become numbers again."""
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def shard_of(array: str, unit: int) -> str:
    """File of one unit's shard of an array, relative to the store."""
    return f"{array}/c/{unit}/0" if array.startswith("layers/") else f"{array}/c/{unit}"


def markers_digest(files: list[Path]) -> str:
    """One digest over the markers in order; a missing one counts as empty."""
    return digest("".join(digest(file.read_bytes() if file.is_file() else b"") for file in files))


class Block(NamedTuple):
    """Some rows of one layer, without those flagged BOS, special, pad or sink."""

    rows: np.ndarray  # (n,) row numbers
    x: Tensor  # (n, d_in) float32
    y: Tensor  # (n, d_out) float32


class Store:
    """A complete store, open for reading. Build it with `Store.open`."""

    def __init__(self, path: Path, attributes: dict, complete: dict) -> None:
        self.path, self.attributes = path, attributes
        self.layers: list[int] = attributes["layers"]
        self.dtype: str = attributes["dtype"]
        self.layout = Layout(**attributes["layout"])
        self.digest: str = complete["markers_sha256"]
        self._statistics = complete["statistics"]
        self._weights: dict[str, str] = complete["weights_sha256"]
        self._indices: dict[Path, np.ndarray] = {}
        self._check_units()
        self.sequence, self.position, self.flags = (self._read_rows(*field) for field in ROW_FIELDS.items())
        group = zarr.open_group(path, mode="r")
        self.token_ids: np.ndarray = group["tokens/ids"][:]  # (n_seq, context)
        self.documents: np.ndarray = group["tokens/doc"][:]  # (n_seq, context)

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open the store at `path`, or in it; FileNotFoundError or ValueError says what is wrong and what to do."""
        path = locate(path)
        attributes, complete = read_attributes(path), path / "_COMPLETE.json"
        if not complete.is_file():
            raise ValueError(f"{path} is not complete: run the same `cli cache` command again and it will go on")
        return cls(path, attributes, read_json(complete))

    def _check_units(self) -> None:
        """DamagedStore unless every marker is the one that was counted and every file has the size it had then."""
        files = [self.path / f"units/{unit}.json" for unit in range(self.layout.n_units)]
        if markers_digest(files) != self.digest:
            raise DamagedStore(
                f"the unit markers of {self.path} have changed: make it anew with `cli cache --overwrite`"
            )
        for file in files:
            for name, written in read_json(file)["files"].items():
                shard = self.path / shard_of(name, int(file.stem))
                if not shard.is_file() or shard.stat().st_size != written["size"]:
                    raise DamagedStore(
                        f"{shard} is missing or not whole: make the store anew with `cli cache --overwrite`"
                    )

    def _read_rows(self, field: str, dtype: str) -> np.ndarray:
        """One row field (N,), checksums verified."""
        parts = []
        for unit in range(self.layout.n_units):
            part, path = np.empty(self.layout.unit_rows, dtype), self.path / shard_of(f"rows/{field}", unit)
            read_chunk(path, read_index(path, 1), 0, memoryview(part).cast("B"))
            parts.append(part[: len(self.layout.rows(unit))])
        return np.concatenate(parts)

    def check_layer(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(
                f"{self.path} has layers {spell(self.layers)}; asked for {layer}: "
                f"choose one of them, or cache it with `cli cache --layers {layer}`"
            )
        return layer

    def mlp(self, layer: int) -> weights.MLP:
        return self._load(f"{self.check_layer(layer)}.safetensors")

    def head(self) -> weights.Head:
        return self._load("head.safetensors")

    def _load(self, name: str) -> weights.MLP | weights.Head:
        path = self.path / "weights" / name
        if not path.is_file() or digest(path.read_bytes()) != self._weights[name]:
            raise DamagedStore(f"{path} is missing or has changed: make the store anew with `cli cache --overwrite`")
        return weights.load(path)

    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path / "tokenizer")

    def moments(self, layer: int, side: str) -> tuple[float, Tensor, Tensor]:
        """Count, mean (d,) and mean square (d,) over the training rows that are not left out, float64."""
        count, name = self._statistics["count"], f"layers/{self.check_layer(layer)}/{side}"
        sums = [torch.tensor(self._statistics[f"{name}/{which}"]).double() for which in ("sum", "sum_of_squares")]
        return count, sums[0] / count, sums[1] / count

    def widths(self, layer: int) -> tuple[int, int]:
        """(d_in, d_out) of a layer."""
        return tuple(self.moments(layer, side)[1].numel() for side in SIDES)

    def chunks(self, *, held_out: bool) -> list[int]:
        """Numbers of the chunks of the training or of the held-out rows."""
        border = self.layout.train_sequences * self.layout.context // self.layout.chunk_rows
        last = -(-self.layout.n_rows // self.layout.chunk_rows)
        return list(range(border, last) if held_out else range(border))

    def chunk_rows(self, chunk: int) -> np.ndarray:
        """Row numbers of a chunk, left-out rows included."""
        start = chunk * self.layout.chunk_rows
        return np.arange(start, min(start + self.layout.chunk_rows, self.layout.n_rows))

    def read(self, layer: int, side: str, chunk: int) -> Tensor:
        """One chunk (rows, d) in the storage dtype, checksums verified; DamagedStore if they do not hold."""
        per_unit = self.layout.unit_rows // self.layout.chunk_rows
        unit, within = divmod(chunk, per_unit)
        path = self.path / shard_of(f"layers/{layer}/{side}", unit)
        if path not in self._indices:
            self._indices[path] = read_index(path, per_unit)
        index = self._indices[path]
        disk = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.uint16}[self.dtype]
        d, odd = divmod(int(index[within, 1]) - 4, disk.itemsize * self.layout.chunk_rows)
        if odd or d < 1:
            raise DamagedStore(
                f"chunk {chunk} of {path} has another size than the layout says: make the store anew with `cli cache --overwrite`"
            )
        # torch's allocations are aligned for reading into: 4x faster than numpy's
        rows = torch.empty(self.layout.chunk_rows, d, dtype=disk)
        read_chunk(path, index, within, memoryview(rows.numpy()).cast("B"))
        return from_disk(rows, self.dtype)[: len(self.chunk_rows(chunk))]

    def block(self, layer: int, chunk: int) -> Block:
        """One chunk of inputs and outputs, rows left out where their flags say so."""
        rows = self.chunk_rows(chunk)
        kept = (self.flags[rows] & LEFT_OUT) == 0
        x, y = (self.read(layer, side, chunk)[torch.from_numpy(kept)].float() for side in SIDES)
        return Block(rows[kept], x, y)

    def blocks(self, layer: int, held_out: bool) -> Iterator[Block]:
        """The training or the held-out rows of a layer, in stored order."""
        self.check_layer(layer)
        for chunk in self.chunks(held_out=held_out):
            yield self.block(layer, chunk)
