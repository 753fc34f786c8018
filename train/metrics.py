"""How good a module is on the held-out rows. FVU is the one error measure:

    FVU = sum |y - y^|^2 / sum |y - mean y|^2     over all evaluated rows, streamed in float64

BOS, special, pad and sink rows are left out; `rows` says how many were evaluated.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cache.store import Block

from . import spd

EVALUATION_ASCENTS = 20  # fresh sign ascents of 0.1: they can cross [0, 1] twice
ADVERSARY_ENTRIES = 2**24  # rows x components that the fresh adversary sees: 64 MiB in fp32
OPEN = 0.1  # a second threshold of L0, beside 0


class Fvu:
    """Fraction of variance unexplained, added up block by block."""

    def __init__(self) -> None:
        self.rows, self.error, self.square, self.sum = 0, 0.0, 0.0, torch.zeros(1, dtype=torch.float64)

    def update(self, target: Tensor, reconstruction: Tensor) -> None:
        """Both (tokens, d_out)."""
        target = target.double().cpu()
        self.rows += len(target)
        self.error += (target - reconstruction.double().cpu()).square().sum().item()
        self.square += target.square().sum().item()
        self.sum = self.sum + target.sum(dim=0)

    def value(self) -> float:
        """NaN if no row was seen or the target does not vary."""
        variance = self.square - self.sum.square().sum().item() / max(self.rows, 1)
        return self.error / variance if variance > 0 else float("nan")


@torch.no_grad()
def evaluate(module: nn.Module, blocks: Iterable[Block], device: str = "cpu") -> dict[str, float]:
    """Every metric of `metrics.json` that comes from data, for any module."""
    fvus: dict[str, Fvu] = {}
    fired, rows, l0, l0_open = None, 0, 0.0, 0.0
    kept_x, kept_y = [], []
    for block in blocks:
        x, y = block.x.to(device), block.y.to(device)
        if isinstance(module, spd.Spd):
            look = module.look(x)
            reconstructions, active = {"fvu": look.low}, look.importance > 0
            l0_open += (look.importance > OPEN).sum().item()
            for name, mask in _masks(look, seed=rows).items():
                reconstructions[f"fvu_{name}"] = module.decode(look.h * mask)
            if sum(map(len, kept_x)) < (most := max(1, ADVERSARY_ENTRIES // len(module.gate))):
                kept_x.append(x), kept_y.append(y)
        else:
            output = module(x)
            reconstructions, active = {"fvu": output.reconstruction}, output.code != 0
        for name, reconstruction in reconstructions.items():
            fvus.setdefault(name, Fvu()).update(y, reconstruction)
        rows += len(x)
        l0 += active.sum().item()
        fired = active.sum(dim=0) + (0 if fired is None else fired)
    metrics = {name: fvu.value() for name, fvu in fvus.items()}
    metrics |= {"l0": l0 / rows, "alive": int((fired > 0).sum()), "dead_fraction": (fired == 0).float().mean().item()}
    if isinstance(module, spd.Spd):
        metrics["l0_0.1"] = l0_open / rows
        metrics |= adversarial(module, torch.cat(kept_x)[:most], torch.cat(kept_y)[:most])
    return metrics | {"rows": rows}


def _masks(look: spd.Look, seed: int) -> dict[str, Tensor]:
    """The masks beside the lowest one, by the name of their FVU."""
    generator = torch.Generator().manual_seed(seed)
    r = torch.rand(look.importance.shape, generator=generator).to(look.importance.device)
    return {
        "unmasked": torch.ones_like(look.importance),
        "rounded": (look.importance > 0).float(),
        "stochastic": look.importance + (1 - look.importance) * r,
    }


def adversarial(module: spd.Spd, x: Tensor, y: Tensor) -> dict[str, float]:
    """FVU under the worst mask source r found, one r shared by all rows: 20 fresh ascents on those same rows.

    Ascents start at random and at r = 0; r = 0 itself counts too. A lower bound on the true worst case.
    """
    look = module.look(x)
    zero = torch.zeros(len(module.gate), device=x.device, dtype=x.dtype)
    start = torch.rand(len(zero), generator=torch.Generator().manual_seed(0)).to(zero)
    found = []
    for r in (zero, *(spd.ascend(module, look, y, first, EVALUATION_ASCENTS) for first in (zero, start))):
        fvu = Fvu()
        fvu.update(y, spd.shared_output(module, look, r))
        found.append(fvu.value())
    return {"fvu_adversarial": max(found), "rows_adversarial": len(x)}
