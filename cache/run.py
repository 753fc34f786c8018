"""Wire stage one: tokenise, lay out, run the model over the units that are still to do, finish.

Pass 0 fixes everything that decides a byte (tokens, layout, sink limits) and writes it down before the first unit;
so a run that was stopped goes on where it was, and a finished one is recognised.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import harvest, models, store, text, weights, writer
from .config import CacheConfig, parse_layers, spell
from .target import check_out, check_target, existing, only_writer

ASSETS = Path(__file__).parent / "assets"
Progress = Callable[[str, int, int], None]


class Summary(NamedTuple):
    """What `cli cache` says at the end."""

    path: Path
    reused: bool  # it was complete already
    lines: list[str]


def run(config: CacheConfig, on_progress: Progress = lambda what, done, total: None) -> Summary:
    """Make the store that `config` asks for, or finish it, or find it finished."""
    require_one_process()
    source = str(ASSETS / "model") if config.model is None else config.model
    path = check_out(config.out or Path("runs") / default_name(config)) / store.NAME
    check_target(path)
    on_progress("loading the model", 0, 0)
    device = pick_device(config.device)
    job = _prepare(config, source, device)
    attributes = _attributes(config, source, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(path):
        if existing(path, attributes, config.overwrite):
            if (path / "_COMPLETE.json").is_file():
                return Summary(path, True, _summary(job, path))
        else:
            _begin(path, job, attributes, on_progress)
        started = time.monotonic()
        written = _write_units(path, job, on_progress)
        writer.finalize(path, job.layout)
    rate = written / max(time.monotonic() - started, 1e-9)
    return Summary(path, False, [*_summary(job, path), f"{rate:,.0f} tokens/s"])


def default_name(config: CacheConfig) -> str:
    if config.model is None:
        return "default"
    return Path(config.model).resolve().name if Path(config.model).is_dir() else config.model.split("/")[-1]


def require_one_process() -> None:
    """ValueError under a launcher of several: each would do all of the work, into one folder."""
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    if n_processes > 1:
        raise ValueError(f"WORLD_SIZE is {n_processes} and this version works in one process: start one")


def pick_device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise ValueError(f"--device is {name!r}: choose auto, cpu, cuda or cuda:N")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {name} and there is no CUDA device here: use --device cpu")
    return name


def _prepare(config: CacheConfig, source: str, device: str) -> harvest.Job:
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
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if tokens.ids.max() >= vocabulary:
        raise ValueError(
            f"the tokenizer gives id {tokens.ids.max()} and the model knows {vocabulary} tokens: they do not belong together"
        )
    special = np.array(sorted(set(tokenizer.all_special_ids) - {tokens.start_id}), dtype=np.int64)
    return harvest.Job(model, tokenizer, found, tokens, special, device, dtype, config.seed)


def _attributes(config: CacheConfig, source: str, job: harvest.Job) -> dict:
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
        "tokenizer": type(job.tokenizer).__name__,
        "attention": job.model.config._attn_implementation,
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


def _begin(path: Path, job: harvest.Job, attributes: dict, on_progress: Progress) -> None:
    """Pass 0: measure what is normal, check the matrices against the model, write everything but the units."""
    on_progress("measuring unit 0", 0, 0)
    medians = harvest.measure(job)
    widths = {one.layer: (one.mlp.up.shape[1], one.mlp.down.shape[0]) for one in job.found}
    probe = harvest.ids_of(job, range(1))[:, :16]
    norms = models.find_norms(job.model, job.found, probe)
    attributes = attributes | {"sink_medians": medians, "sink_factor": harvest.SINK_FACTOR}
    begun = path.with_name(f"{store.NAME}.begun")  # renamed when all of it is there: a store is never half begun
    shutil.rmtree(begun, ignore_errors=True)
    writer.create(begun, attributes, job.layout, widths, (job.tokens.ids, job.tokens.documents))
    for one in job.found:
        pre, post = norms[one.layer]
        weights.save(
            dataclasses.replace(one.mlp, pre_norm=pre, post_norm=post), begun / f"weights/{one.layer}.safetensors"
        )
    weights.save(models.read_head(job.model, probe), begun / "weights/head.safetensors")
    job.tokenizer.save_pretrained(begun / "tokenizer")
    begun.rename(path)


def _write_units(path: Path, job: harvest.Job, on_progress: Progress) -> int:
    layout, done = job.layout, writer.marked_units(path)
    for stale in path.rglob("*.partial"):
        stale.unlink()
    medians, written = store.read_attributes(path)["sink_medians"], 0
    total = layout.n_rows
    finished = sum(len(layout.rows(unit)) for unit in done)
    on_progress("caching tokens", finished, total)
    with models.listen(job.found) as heard:
        for unit in sorted(set(range(layout.n_units)) - done):
            unit_writer = writer.UnitWriter(path, unit, layout, job.layers, job.dtype)
            try:
                for number, sequences in enumerate(layout.batches(unit)):
                    unit_writer.append(*harvest.batch(job, heard, medians, unit, number, sequences))
                    written += len(sequences) * layout.context
                    on_progress("caching tokens", finished + written, total)
                unit_writer.commit(held_out=layout.held_out(unit), seed=[job.seed, unit])
            except BaseException:
                unit_writer.abandon()
                raise
    return written


def _summary(job: harvest.Job, path: Path) -> list[str]:
    layout = job.layout
    n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    held = layout.n_rows - layout.train_sequences * layout.context
    return [
        f"{layout.n_rows:,} tokens ({held:,} held out) of layers {spell(job.layers)}, {job.dtype}, {n_bytes / 1e6:,.0f} MB",
        f"each document begins with {job.tokens.starter}; {layout.n_sequences:,} sequences of {layout.context}",
    ]
