"""The matrices of one MLP, and the function they define.

    gated     y = down (act(gate x + gate_bias) * (up x + up_bias)) + down_bias
    ungated   y = down (act(up x + up_bias)) + down_bias

In formulas gate, up, down are U, V, P: rows u_i, v_i and columns p_i of neuron i.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.nn import functional as F

from .shards import write_file

# act(z), and the native gate g(z) = act(z)/z with its limit at 0. For the first four g(z) + g(-z) = 1.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "identity": lambda z: z,
}
NATIVE_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.sigmoid,
    "gelu": lambda z: torch.special.ndtr(z),
    "gelu_tanh": lambda z: 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "relu": lambda z: (z > 0).to(z.dtype),
    "identity": torch.ones_like,
}


@dataclass(frozen=True)
class Norm:
    """A normalisation layer. `gain` is what multiplies the normalised vector (Gemma's 1 + weight is added already)."""

    kind: str  # "rms" | "layer"
    eps: float
    gain: Tensor  # (d,)
    bias: Tensor | None = None  # (d,)
    shared: bool = False  # attention reads the same norm


@dataclass(frozen=True)
class MLP:
    """One MLP: `gate` and `up` are (m, d_in), `down` is (d_out, m); an ungated MLP has `gate` None."""

    activation: str
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None  # (m,)
    up_bias: Tensor | None = None  # (m,)
    down_bias: Tensor | None = None  # (d_out,)
    pre_norm: Norm | None = None
    post_norm: Norm | None = None

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def width(self) -> int:
        return self.up.shape[0]

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden activations h (tokens, m) of inputs x (tokens, d_in)."""
        act = ACTIVATIONS[self.activation]
        w = F.linear(x, self.up, self.up_bias)
        return act(F.linear(x, self.gate, self.gate_bias)) * w if self.gated else act(w)

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs y (tokens, d_out) of inputs x (tokens, d_in)."""
        return F.linear(self.hidden(x), self.down, self.down_bias)

    def map(self, function: Callable[[Tensor], Tensor]) -> "MLP":
        """The same MLP with `function` applied to each of its own tensors; the norms are left as they are."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return replace(self, **{k: function(t) for k, t in tensors.items() if isinstance(t, Tensor)})


@dataclass(frozen=True)
class Head:
    """What turns token ids into the residual stream and the residual stream into logits."""

    embedding: Tensor  # (vocabulary, d)
    unembedding: Tensor  # (vocabulary, d)
    final_norm: Norm | None = None


def save(weights: MLP | Head, path: Path) -> None:
    """Write every tensor to safetensors, and every other field as JSON in its metadata."""
    tensors, rest = {}, {}
    for prefix, part in [("", weights), *_norms(weights)]:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Tensor):
                tensors[prefix + field.name] = value.detach().contiguous().clone()  # clone: tied heads share memory
            elif not isinstance(value, Norm) and value is not None:
                rest[prefix + field.name] = value
    write_file(path, to_bytes(tensors, metadata={"fields": json.dumps({"class": type(weights).__name__, **rest})}))


def load(path: Path) -> MLP | Head:
    """Read what `save` wrote."""
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["fields"]) | {name: file.get_tensor(name) for name in file.keys()}
    kind = {"MLP": MLP, "Head": Head}[fields.pop("class")]
    norms: dict[str, dict] = {}
    for name in [name for name in fields if "." in name]:
        owner, field = name.split(".")
        norms.setdefault(owner, {})[field] = fields.pop(name)
    return kind(**fields, **{owner: Norm(**parts) for owner, parts in norms.items()})


def _norms(weights: MLP | Head) -> list[tuple[str, Norm]]:
    fields = [(f.name, getattr(weights, f.name)) for f in dataclasses.fields(weights)]
    return [(f"{name}.", value) for name, value in fields if isinstance(value, Norm)]
