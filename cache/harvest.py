"""From sequences to rows: run the model on one forward batch, flag its rows, permute them, cast them.

What a batch holds depends on its unit and its number alone, never on who computes it or when.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import models, store, text, writer
from .layout import Layout

SINK_FACTOR = 10.0  # a row whose input or output norm is over 10x the median is an attention sink's


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


def measure(job: Job) -> dict[str, float]:
    """Median row norm of every array over unit 0; ValueError if a matrix read from the model is not what it computes."""
    norms: dict[str, list[Tensor]] = {}
    with models.listen(job.found) as heard:
        for number, sequences in enumerate(job.layout.batches(0)):
            activations = heard(job.model, ids_of(job, sequences))
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


def batch(job: Job, heard, medians: dict[str, float], unit: int, number: int, sequences: range):
    """(row fields, activations) of one forward batch, both in the permuted order."""
    ids = job.tokens.ids[sequences.start : sequences.stop]
    order = np.random.default_rng([job.seed, unit, number]).permutation(ids.size)
    activations = heard(job.model, ids_of(job, sequences))
    flags, arrays = _flags(job, ids, job.layout.held_out(unit)), {}
    shuffle = torch.from_numpy(order).to(job.device)
    for (layer, side), values in activations.items():
        name = f"layers/{layer}/{side}"
        sink = values.float().norm(dim=1) > SINK_FACTOR * medians[name]
        flags |= np.where(sink.cpu().numpy(), store.SINK, 0).astype(np.uint8)
        arrays[name] = writer.to_disk(values[shuffle], job.dtype)
        _check_finite(arrays[name], job.dtype, layer, side)
    rows = {
        "seq": np.repeat(np.arange(sequences.start, sequences.stop), job.layout.context)[order],
        "pos": np.tile(np.arange(job.layout.context), len(sequences))[order],
        "flags": flags[order],
    }
    return rows, arrays


def ids_of(job: Job, sequences: range) -> Tensor:
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
