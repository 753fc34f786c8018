"""One output direction while the data streams by: its spectrum, its top contexts and its truncation curves.

The activation to be predicted is the stored output along the direction, e.y, with the MLP's true nonlinearity in it;
beside it stand the trained module's own output and, for a component, only the tokens on which it is active.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.tensor import CPTensor

from .directions import Direction
from .labels import Lens, TopContexts, context
from .spectra import Spectrum, Truncation, direction_spectrum, effective_ranks, pairs_for_share


@dataclass(frozen=True)
class Null:
    """What random weights of the same shapes give: mean ranks, and one spectrum of norm 1."""

    ranks: dict[str, float]
    values: Tensor  # (d,)


class Reading:
    """`update` with every held-out block, then ask for `section`."""

    def __init__(self, direction: Direction, tensor: CPTensor, lens: Lens, *, top: int, contexts: int) -> None:
        self.direction, self.lens = direction, lens
        pairs = direction_spectrum(tensor, direction.vector)
        positive, negative = pairs.ends(top)
        self.shown = positive + negative
        vectors, self.ends = pairs.vectors.clone(), {}
        for i in self.shown:
            vectors[:, i], self.ends[i] = lens.reads(vectors[:, i])
        self.pairs = Spectrum(pairs.values, vectors)
        self.tops = TopContexts(vectors[:, self.shown], contexts)
        self.curves: dict[str, Truncation] = {}

    def update(self, rows: np.ndarray, x: Tensor, y: Tensor, output: Tensor | None, code: Tensor | None) -> None:
        """Inputs in the report's coordinates, stored outputs, and the module's outputs and code if there is one."""
        self.tops.update(rows, x)
        terms, truth = Truncation(self.pairs).cumulative(x), y @ self.direction.vector
        self._curve("stored output", terms, truth)
        if output is not None:
            self._curve("module's output", terms, output @ self.direction.vector)
        if code is not None and self.direction.component is not None:
            active = code[:, self.direction.component] != 0
            self._curve("stored output, component active", terms[active], truth[active])

    def _curve(self, name: str, terms: Tensor, truth: Tensor) -> None:
        self.curves.setdefault(name, Truncation(self.pairs)).update(terms, truth)

    def section(self, store: Any, null: Null, squared_norm: float) -> dict[str, Any]:
        """Everything the report says about this direction."""
        pairs = self.pairs
        return {
            "name": self.direction.name,
            "kind": self.direction.kind,
            "output_tokens": self.lens.writes(self.direction.vector),
            "norm": pairs.norm,
            "share_of_tensor": pairs.norm**2 / squared_norm,
            "trace": pairs.trace,
            "trace_per_dimension": pairs.trace / len(pairs.values),
            "traceless_norm": float(pairs.traceless.norm()),
            "ranks": {**effective_ranks(pairs.values), "pairs90": pairs_for_share(pairs.values)},
            "null_ranks": null.ranks,
            "values": pairs.values.tolist(),
            "null_values": (null.values * pairs.norm).tolist(),
            "shown": self.shown,
            "pairs": [self._pair(k, store) for k in range(len(self.shown))],
            "truncation": {
                name: {"tokens": curve.count, "correlation": curve.curve().tolist()}
                for name, curve in self.curves.items()
            },
        }

    def _pair(self, k: int, store: Any) -> dict[str, Any]:
        index = self.shown[k]
        value = float(self.pairs.values[index])
        contexts = []
        for row, projection in self.tops.best(k, store.sequence):
            end = "A" if projection > 0 else "B"
            push = {"row": row, "end": end, "projection": projection, "activation": value * projection**2}
            contexts.append(context(store, self.lens.vocabulary, row) | push)
        return {
            "index": index,
            "value": value,
            "share": value**2 / self.pairs.norm**2,
            "mean_activation": value * float(self.tops.mean_square[k]),
            "input_tokens": self.ends[index],
            "contexts": contexts,
        }


def arrays(readings: list[Reading]) -> dict[str, Tensor]:
    """Eigenvalues, eigenvectors and directions for arrays.safetensors, numbered as in the report."""
    tensors: dict[str, Tensor] = {}
    for number, reading in enumerate(readings):
        tensors[f"directions/{number}/vector"] = reading.direction.vector
        tensors[f"directions/{number}/values"] = reading.pairs.values
        tensors[f"directions/{number}/vectors"] = reading.pairs.vectors
    return {name: torch.as_tensor(value).double().contiguous().clone() for name, value in tensors.items()}
