"""Every component as one row of a table: its size, its angles, when it fires, and how far it has come from its parent.

    triple  p (x) sym(u v^T)     <t, t'> = (p.p') ((u.u')(v.v') + (u.v')(v.u')) / 2
    pair    p (x) v              <t, t'> = (p.p') (v.v')

The cosine to the parent is that of the two rank-one terms. A pair made from a gated neuron has no such cosine: its
parent's terms are û±v̂, so what is given is |cos(p, p')| times the share of its read vector's length in span(u', v').
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cache.weights import MLP


@dataclass(frozen=True)
class Components:
    """One entry per component (C,); None where a column makes no sense for this module."""

    size: Tensor  # |p| |u| |v|, or |p| |v|
    cos_uv: Tensor | None
    cos_up: Tensor | None
    cos_vp: Tensor | None
    firing: Tensor  # share of tokens on which the code is not 0
    parent: Tensor | None
    cos_parent: Tensor | None
    cos_sibling: Tensor | None  # largest cosine to another component of the same parent; NaN without one


def describe(module: MLP, original: MLP, firing: Tensor, parents: Tensor | None) -> Components:
    """Columns for the components of `module`, whose parents are neurons of `original`."""
    module, original = (mlp.map(lambda part: part.detach().double()) for mlp in (module, original))
    write, up, gate = module.down.T, module.up, module.gate  # (C, d_out), (C, d), (C, d)
    square = write.shape[1] == up.shape[1]
    size = write.norm(dim=1) * up.norm(dim=1) * (1 if gate is None else gate.norm(dim=1))
    return Components(
        size=size,
        cos_uv=None if gate is None else _cosine(gate, up),
        cos_up=None if gate is None or not square else _cosine(gate, write),
        cos_vp=_cosine(up, write) if square else None,
        firing=firing,
        parent=parents,
        cos_parent=None if parents is None else parent_cosine(module, original, parents),
        cos_sibling=None if parents is None else sibling_cosine(module, parents),
    )


def term_inner(a: MLP, i: Tensor, b: MLP, j: Tensor) -> Tensor:
    """<t_i, t'_j> of paired rank-one terms (n,), both gated or both not."""
    written = (a.down.T[i] * b.down.T[j]).sum(1)
    plain = (a.up[i] * b.up[j]).sum(1)
    if a.gate is None:
        return written * plain
    crossed = (a.gate[i] * b.up[j]).sum(1) * (a.up[i] * b.gate[j]).sum(1)
    return written * ((a.gate[i] * b.gate[j]).sum(1) * plain + crossed) / 2


def term_cosine(a: MLP, i: Tensor, b: MLP, j: Tensor) -> Tensor:
    return _divide(term_inner(a, i, b, j), (term_inner(a, i, a, i) * term_inner(b, j, b, j)).sqrt())


def parent_cosine(module: MLP, original: MLP, parents: Tensor) -> Tensor:
    every = torch.arange(module.width)
    if module.gated == original.gated:
        return term_cosine(module, every, original, parents)
    u, v = original.gate[parents], original.up[parents]  # (C, d)
    basis, _ = torch.linalg.qr(torch.stack([u, v], dim=2))  # (C, d, 2)
    inside = torch.einsum("cd,cdk->ck", module.up, basis).norm(dim=1)
    return _cosine(module.down.T, original.down.T[parents]).abs() * _divide(inside, module.up.norm(dim=1))


def sibling_cosine(module: MLP, parents: Tensor) -> Tensor:
    """Largest term cosine of each component to a sibling (C,); NaN for an only child."""
    best = torch.full((module.width,), -torch.inf, dtype=torch.float64)
    order = parents.argsort(stable=True)
    largest_family = int(parents.bincount().max())
    for step in range(1, largest_family):  # pairs that lie `step` apart in the order of families
        i, j = order[:-step], order[step:]
        related = parents[i] == parents[j]
        i, j = i[related], j[related]
        cosine = term_cosine(module, i, module, j)
        best[i] = torch.maximum(best[i], cosine)
        best[j] = torch.maximum(best[j], cosine)  # after the line above: a middle sibling is in both
    return torch.where(best.isinf(), torch.nan, best)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return _divide((a * b).sum(1), a.norm(dim=1) * b.norm(dim=1))


def _divide(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top / bottom, 0.0)
