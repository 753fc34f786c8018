"""Wire stage one: tokenise, lay out, run the model over the units that are still to do, finish.

Pass 0 fixes everything that decides a byte (tokens, layout, sink limits) and writes it down before the first unit;
so a run that was stopped goes on where it was, and a finished one is recognised.
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import models, store, text, weights
from .config import CacheConfig, parse_layers, spell
from .layout import Layout

ASSETS = Path(__file__).parent / "assets"
SOURCE_FOLDERS = {"cache", "train", "analyze"}  # a run written there would mix with the package's own files
SINK_FACTOR = 10.0  # a row whose input or output norm is over 10x the median is an attention sink's
Progress = Callable[[str, int, int], None]


class Summary(NamedTuple):
    """What `cli cache` says at the end."""

    path: Path
    reused: bool  # it was complete already
    lines: list[str]


class Job(NamedTuple):
    """Everything that writing a unit needs."""

    model: torch.nn.Module
    tokenizer: Any
    found: list[models.Found]
    tokens: text.Tokens
    special: np.ndarray  # ids of special tokens other than the one that begins documents
    device: str
    dtype: str
    seed: int

    @property
    def layout(self) -> Layout:
        return self.tokens.layout

    @property
    def layers(self) -> list[int]:
        return [one.layer for one in self.found]


def run(config: CacheConfig, on_progress: Progress = lambda what, done, total: None) -> Summary:
    """Make the store that `config` asks for, or finish it, or find it finished."""
    source = str(ASSETS / "model") if config.model is None else config.model
    path = check_out(config.out or Path("runs") / default_name(config)) / store.NAME
    _check_target(path)
    on_progress("loading the model", 0, 0)
    device = pick_device(config.device)
    job = _prepare(config, source, device)
    attributes = _attributes(config, source, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_writer(path):
        if _existing(path, attributes, config.overwrite):
            if (path / "_COMPLETE.json").is_file():
                return Summary(path, True, _summary(job, path))
        else:
            _begin(path, job, attributes, on_progress)
        started = time.monotonic()
        written = _write_units(path, job, on_progress)
        store.finalize(path, job.layout)
    rate = written / max(time.monotonic() - started, 1e-9)
    return Summary(path, False, [*_summary(job, path), f"{rate:,.0f} tokens/s"])


def default_name(config: CacheConfig) -> str:
    return "default" if config.model is None else config.model.rstrip("/").split("/")[-1]


def pick_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {name} and there is no CUDA device here: use --device cpu")
    return name


def check_out(out: Path) -> Path:
    """Refuse a folder of the source tree: outputs belong under runs/."""
    inside = out.resolve().relative_to(Path.cwd()).parts[:1] if out.resolve().is_relative_to(Path.cwd()) else ()
    if set(inside) & SOURCE_FOLDERS:
        raise ValueError(
            f"--out {out} lies in the source folder ./{inside[0]}: choose a folder such as runs/{out.name}"
        )
    return out


def _check_target(path: Path) -> None:
    """The output folder may be absent, empty, or a run folder; anything else is somebody's and stays."""
    folder = path.parent
    if folder.is_file():
        raise FileExistsError(f"--out {folder} is a file: choose a folder")
    if path.exists() and not (path / "zarr.json").is_file():
        raise FileExistsError(f"{path} exists and is not a store: choose another --out")
    foreign = [p.name for p in sorted(folder.iterdir()) if not _ours(p)] if folder.is_dir() else []
    if foreign and not path.exists():
        raise FileExistsError(f"--out {folder} holds something else ({foreign[0]}): choose an empty folder")


def _ours(entry: Path) -> bool:
    """Run folders, reports and our own hidden or unfinished files may stand beside a store."""
    return entry.name.startswith((".", store.NAME)) or entry.name == "report" or (entry / "config.json").is_file()


def _prepare(config: CacheConfig, source: str, device: str) -> Job:
    compute = config.compute_dtype
    if compute == "auto":
        compute = "float32" if device == "cpu" else "bfloat16"
    documents, streamed = text.read_documents(
        str(ASSETS / "text.txt") if config.text is None else config.text, config.text_field, config.text_split
    )
    model, tokenizer = models.load(source, getattr(torch, compute), device)
    found = models.find_mlps(model)
    wanted = parse_layers(config.layers, [one.layer for one in found])
    found = [one for one in found if one.layer in wanted]
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and config.context > longest:
        raise ValueError(f"--context is {config.context} and the model was made for at most {longest} tokens")
    dtype = config.dtype
    if dtype == "auto":
        dtype = compute if compute != "float32" else "float16"
    widest = max(max(one.mlp.up.shape[1], one.mlp.down.shape[0]) for one in found)
    tokens = text.pack(
        documents, tokenizer, merge=isinstance(documents, list), context=config.context, batch=config.batch_size,
        row_bytes=widest * store.DISK_DTYPES[dtype].itemsize, seed=config.seed,
        n_tokens=config.tokens or (text.STREAMED_TOKENS if streamed else None),
    )  # fmt: skip
    special = np.array(sorted(set(tokenizer.all_special_ids) - {tokens.start_id}), dtype=np.int64)
    return Job(model, tokenizer, found, tokens, special, device, dtype, config.seed)


def _attributes(config: CacheConfig, source: str, job: Job) -> dict:
    """Provenance; `config_sha256` covers what changes a byte, never paths or the number of processes."""
    config_fields = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    decides = {
        "model": models.identity(source, job.model),
        "tokens": job.tokens.digest,
        "layers": job.layers,
        "dtype": job.dtype,
        "compute_dtype": str(job.model.dtype).removeprefix("torch."),
        "layout": dataclasses.asdict(job.layout),
        "seed": config.seed,
        "device_kind": job.device.split(":")[0],
    }
    packages = ("expanse-mlp", "torch", "transformers", "datasets", "zarr", "numcodecs")
    return {
        "expanse_schema": store.SCHEMA,
        "config_sha256": store.digest(json.dumps(decides, sort_keys=True)),
        **decides,
        "source": source if config.model else "the small model that ships with expanse-mlp",
        "text": config.text or "the text that ships with expanse-mlp",
        "document_starter": job.tokens.starter,
        "tokens_dropped": job.tokens.dropped,
        "hooks": {str(one.layer): one.name for one in job.found},
        "row_order": "numpy default_rng([seed, unit, batch]).permutation over the rows of each forward batch",
        "config": config_fields,
        "versions": {name: _version(name) for name in packages},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _existing(path: Path, attributes: dict, overwrite: bool) -> bool:
    """True if `path` holds this very store, begun or finished. FileExistsError if it holds another."""
    if not (path / "zarr.json").is_file():
        return False
    old = json.loads((path / "zarr.json").read_text()).get("attributes", {})
    if old.get("config_sha256") == attributes["config_sha256"]:
        return True
    if overwrite and "expanse_schema" in old:
        shutil.rmtree(path)
        return False
    store.read_attributes(path)
    changed = [
        k for k in ("model", "tokens", "layers", "dtype", "compute_dtype", "layout", "seed") if old[k] != attributes[k]
    ]
    raise FileExistsError(
        f"{path} was made with another {' and '.join(changed) or 'device'}: choose another --out, or replace it with --overwrite"
    )


@contextmanager
def _only_writer(path: Path):
    """One writing run at a time; the lock is the kernel's, so a killed run leaves none."""
    with open(path.parent / f".{store.NAME}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another run is writing {path}: wait for it, or choose another --out") from error
        yield


def _begin(path: Path, job: Job, attributes: dict, on_progress: Progress) -> None:
    """Pass 0: measure what is normal, check the matrices against the model, write everything but the units."""
    on_progress("measuring unit 0", 0, 0)
    medians = _measure(job)
    widths = {one.layer: (one.mlp.up.shape[1], one.mlp.down.shape[0]) for one in job.found}
    probe = _ids(job, range(1))[:, :16]
    norms = models.find_norms(job.model, job.found, probe)
    attributes = attributes | {"sink_medians": medians, "sink_factor": SINK_FACTOR}
    begun = path.with_name(f"{store.NAME}.begun")  # renamed when all of it is there: a store is never half begun
    shutil.rmtree(begun, ignore_errors=True)
    store.create(begun, attributes, job.layout, widths, (job.tokens.ids, job.tokens.documents))
    for one in job.found:
        pre, post = norms[one.layer]
        weights.save(
            dataclasses.replace(one.mlp, pre_norm=pre, post_norm=post), begun / f"weights/{one.layer}.safetensors"
        )
    weights.save(models.read_head(job.model, probe), begun / "weights/head.safetensors")
    job.tokenizer.save_pretrained(begun / "tokenizer")
    begun.rename(path)


def _measure(job: Job) -> dict[str, float]:
    """Median row norm of every array over unit 0; ValueError if a matrix read from the model is not what it computes."""
    norms: dict[str, list[Tensor]] = {}
    with models.listen(job.found) as heard:
        for number, sequences in enumerate(job.layout.batches(0)):
            activations = heard(job.model, _ids(job, sequences))
            if number == 0:
                _check_matrices(job, activations)
            for (layer, side), values in activations.items():
                norms.setdefault(f"layers/{layer}/{side}", []).append(values.float().norm(dim=1))
    return {name: torch.cat(parts).median().item() for name, parts in norms.items()}


def _check_matrices(job: Job, activations: dict[tuple[int, str], Tensor]) -> None:
    limit = 1e-3 if job.model.dtype == torch.float32 else 5e-2
    for one in job.found:
        x, y = (activations[one.layer, side][:64].float().cpu() for side in store.SIDES)
        error = ((one.mlp(x) - y).norm() / y.norm()).item()
        if not error < limit:
            raise ValueError(
                f"the matrices of {one.name} give its output only to {error:.1e}: this kind of MLP is not supported"
            )


def _write_units(path: Path, job: Job, on_progress: Progress) -> int:
    layout, done = job.layout, store.marked_units(path)
    for stale in path.rglob("*.partial"):
        stale.unlink()
    medians, written = store.read_attributes(path)["sink_medians"], 0
    total = layout.n_rows
    finished = sum(len(layout.rows(unit)) for unit in done)
    on_progress("caching tokens", finished, total)
    with models.listen(job.found) as heard:
        for unit in sorted(set(range(layout.n_units)) - done):
            writer = store.UnitWriter(path, unit, layout, job.layers, job.dtype)
            try:
                for number, sequences in enumerate(layout.batches(unit)):
                    writer.append(*_batch(job, heard, medians, unit, number, sequences))
                    written += len(sequences) * layout.context
                    on_progress("caching tokens", finished + written, total)
                writer.commit(layout.held_out(unit))
            except BaseException:
                writer.abandon()
                raise
    return written


def _batch(job: Job, heard, medians: dict[str, float], unit: int, number: int, sequences: range):
    """(row fields, activations) of one forward batch, both in the permuted order."""
    ids = job.tokens.ids[sequences.start : sequences.stop]
    order = np.random.default_rng([job.seed, unit, number]).permutation(ids.size)
    activations = heard(job.model, _ids(job, sequences))
    flags, arrays = _flags(job, ids, job.layout.held_out(unit)), {}
    shuffle = torch.from_numpy(order).to(job.device)
    for (layer, side), values in activations.items():
        name = f"layers/{layer}/{side}"
        sink = values.float().norm(dim=1) > SINK_FACTOR * medians[name]
        flags |= np.where(sink.cpu().numpy(), store.SINK, 0).astype(np.uint8)
        arrays[name] = store.to_disk(values[shuffle], job.dtype)
        _check_finite(arrays[name], job.dtype, layer, side)
    rows = {
        "seq": np.repeat(np.arange(sequences.start, sequences.stop), job.layout.context)[order],
        "pos": np.tile(np.arange(job.layout.context), len(sequences))[order],
        "flags": flags[order],
    }
    return rows, arrays


def _ids(job: Job, sequences: range) -> Tensor:
    return torch.from_numpy(job.tokens.ids[sequences.start : sequences.stop].astype(np.int64)).to(job.device)


def _flags(job: Job, ids: np.ndarray, held_out: bool) -> np.ndarray:
    flat = ids.reshape(-1)
    flags = np.zeros(flat.shape, dtype=np.uint8)
    if job.tokens.start_id is not None:
        flags[flat == job.tokens.start_id] |= store.BOS
    flags[np.isin(flat, job.special)] |= store.SPECIAL
    pad = job.model.config.pad_token_id
    if pad is not None and pad != job.tokens.start_id:
        flags[flat == pad] |= store.PAD
    return flags | (store.HELD_OUT if held_out else 0)


def _check_finite(values: np.ndarray, dtype: str, layer: int, side: str) -> None:
    finite = store.from_disk(torch.from_numpy(values), dtype).isfinite()
    if not finite.all():
        raise ValueError(
            f"layer {layer} {side} has {int((~finite).sum())} values that {dtype} cannot hold: "
            "store it with --dtype bfloat16 or float32"
        )


def _summary(job: Job, path: Path) -> list[str]:
    layout = job.layout
    n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    held = layout.n_rows - layout.train_sequences * layout.context
    return [
        f"{layout.n_rows:,} tokens ({held:,} held out) of layers {spell(job.layers)}, {job.dtype}, {n_bytes / 1e6:,.0f} MB",
        f"each document begins with {job.tokens.starter}; {layout.n_sequences:,} sequences of {layout.context}",
    ]
