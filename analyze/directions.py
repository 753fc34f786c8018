"""Output directions by name: what part of an MLP's output a spectrum is about. Each has unit length.

hosvd:N        the N directions that carry most of the tensor: top left singular vectors of its output unfolding
token:STRING   what raises the logit of a token above the mean: its row of the unembedding, norms folded in
component:N    what component N writes: its column of `down`
"""

import re
from dataclasses import dataclass

from torch import Tensor

from .labels import Lens, both_ends

SEPARATOR = re.compile(r",(?=\s*(?:hosvd|token|component):)")  # a token may itself hold a comma


@dataclass(frozen=True)
class Direction:
    name: str
    kind: str  # hosvd | token | component
    vector: Tensor  # (d_out,)
    component: int | None = None


@dataclass(frozen=True)
class Sources:
    """Where directions come from."""

    hosvd: Tensor  # (d_out, d_out) columns, strongest first
    down: Tensor  # (d_out, C)
    lens: Lens


def parse(text: str) -> list[tuple[str, str]]:
    """Pairs (kind, argument); ValueError for anything else."""
    pairs = []
    for item in SEPARATOR.split(text):
        kind, colon, argument = item.lstrip().partition(":")
        if kind not in ("hosvd", "token", "component") or not colon or not argument:
            raise ValueError(f"direction {item.strip()!r} is not hosvd:N, token:STRING or component:N")
        if kind != "token" and not argument.strip().isdecimal():
            raise ValueError(f"direction {item.strip()!r}: {argument.strip()!r} is not a number, give {kind}:0 or more")
        pairs.append((kind, argument if kind == "token" else argument.strip()))
    return pairs


def resolve(text: str, sources: Sources) -> list[Direction]:
    """The directions that `text` names, in its order."""
    makers = {"hosvd": _hosvd, "token": _token, "component": _component}
    return [direction for kind, argument in parse(text) for direction in makers[kind](argument, sources)]


def _hosvd(argument: str, sources: Sources) -> list[Direction]:
    count, most = int(argument), sources.hosvd.shape[1]
    if not 1 <= count <= most:
        raise ValueError(
            f"hosvd:{count} is out of range: the output has {most} directions, give hosvd:1 to hosvd:{most}"
        )
    vectors = [signed(sources.hosvd[:, s], sources.lens) for s in range(count)]
    return [Direction(f"HOSVD {s + 1}", "hosvd", vector) for s, vector in enumerate(vectors)]


def _token(argument: str, sources: Sources) -> list[Direction]:
    lens = sources.lens
    if lens.readout is None:
        raise ValueError(
            f"token:{argument} needs an unembedding as wide as the MLP's output: give hosvd:N or component:N"
        )
    token = lens.vocabulary.find(argument)
    return [Direction(f"token {lens.vocabulary.shown[token]}", "token", _unit(lens.readout[token].double()))]


def _component(argument: str, sources: Sources) -> list[Direction]:
    number, count = int(argument), sources.down.shape[1]
    if number >= count:
        raise ValueError(
            f"component:{number} is out of range: there are {count}, give component:0 to component:{count - 1}"
        )
    column = sources.down[:, number].double()
    if not bool(column.any()):
        raise ValueError(f"component:{number} writes nothing: its column of down is zero, choose another one")
    return [Direction(f"component {number}", "component", _unit(column), number)]


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def signed(vector: Tensor, lens: Lens) -> Tensor:
    """A singular vector's sign is free: positive where its strongest output token is."""
    if lens.readout is None:
        return vector * vector[vector.abs().argmax()].sign()
    return -vector if both_ends(lens.readout, vector, 1).flip else vector
