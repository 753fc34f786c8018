"""Where a report comes from: model, layer, store, run, coordinates, tokens and versions."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from cache.store import BOS, HELD_OUT, LEFT_OUT, PAD, SINK, SPECIAL, Store

from .config import AnalyzeConfig
from .subject import Subject

FLAGS = {"bos": BOS, "special": SPECIAL, "pad": PAD, "sink": SINK}


def describe(subject: Subject, config: AnalyzeConfig) -> dict[str, Any]:
    """The head of the report."""
    store, mlp, run = subject.store, subject.mlp, subject.run
    attributes = store.attributes
    facts = {
        "model": name_of(attributes.get("source")),
        "model id": attributes.get("model"),
        "layer": subject.layer,
        "module": "the untouched MLP"
        if run is None
        else f"{run.config.kind}, {run.config.init}, x{run.config.expansion}",
        "run": None if run is None else run.path.resolve().name,
        "text": name_of(attributes.get("text")),
        "store digest": store.digest,
        "stored as": attributes.get("dtype"),
        "analysed in": "float64",
        "coordinates": subject.space.name,
        "tokens read": f"at most {config.tokens:,} training and {config.tokens:,} held-out rows",
        "rows left out": left_out(store),
        "null seed": config.seed,
        "expanse-mlp": installed(),
        "torch": version("torch"),
    }
    return {
        "title": f"Layer {subject.layer} of {name_of(attributes.get('source'))}",
        "model": name_of(attributes.get("source")),
        "layer": subject.layer,
        "mlp": {
            "activation": mlp.activation,
            "gated": mlp.gated,
            "width": mlp.width,
            "d_in": mlp.up.shape[1],
            "d_out": mlp.down.shape[0],
            "input_biases": any(bias is not None and bool(bias.any()) for bias in (mlp.gate_bias, mlp.up_bias)),
        },
        "space": subject.space.name,
        "provenance": {name: value for name, value in facts.items() if value is not None},
    }


def name_of(source: str | None) -> str:
    """The last part of a local path, or a Hugging Face id as it is: reports are shared, folders are not."""
    if source is None:
        return "an unnamed model"
    return Path(source).name if Path(source).is_absolute() or source.startswith((".", "~")) else source


def held_out_rows(store: Store) -> int:
    """Held-out rows that are not left out."""
    flags = np.asarray(store.flags)
    return int((((flags & HELD_OUT) != 0) & ((flags & LEFT_OUT) == 0)).sum())


def left_out(store: Store) -> str:
    """How many rows of the whole store each flag takes away."""
    flags = np.asarray(store.flags)
    counts = ", ".join(f"{name} {int(((flags & bit) != 0).sum()):,}" for name, bit in FLAGS.items())
    return f"{int(((flags & LEFT_OUT) != 0).sum()):,} of {len(flags):,} ({counts})"


def installed() -> str:
    try:
        return version("expanse-mlp")
    except PackageNotFoundError:
        return "not installed"
