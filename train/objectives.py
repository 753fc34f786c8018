"""What is minimised: one number, and every raw term of it by name.

    transcoders   FVU = mean |y - y^|^2 / E|y - mean y|^2
    spd           1/2 stochastic + 1/2 adversarial + 1/2 unmasked + 1/2 cp + sparsity * smooth L0

The stochastic, adversarial and unmasked terms are FVUs as well, so the weights are comparable across layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache.weights import MLP

from . import spd
from .modules import GatedTopK, TopK


class Step(NamedTuple):
    """Where in the run a loss is computed."""

    share: float  # of the run that is done, in [0, 1]
    generator: torch.Generator  # for the randomness of this step


class TranscoderObjective(nn.Module):
    def __init__(self, output_variance: float) -> None:
        super().__init__()
        self.output_variance = output_variance

    def forward(self, module: TopK | GatedTopK, x: Tensor, y: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        output = module(x)
        fvu = (output.reconstruction - y).square().sum(dim=1).mean() / self.output_variance
        return fvu, {"fvu": fvu, "l0": (output.code != 0).sum(dim=1).float().mean()}


class SpdObjective(nn.Module):
    """Holds the persistent adversary: one r in [0, 1]^C shared by all tokens, two sign ascents a step."""

    def __init__(self, module: spd.Spd, target: MLP, *, sparsity: float) -> None:
        super().__init__()
        self.sparsity = sparsity
        self.register_buffer("adversary", torch.full((len(module.gate),), 0.5))
        self.cp = spd.CPDistance(target)

    def forward(self, module: spd.Spd, x: Tensor, y: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        look = module.look(x)
        self.adversary = spd.ascend(module, look, y, self.adversary, spd.ASCENTS)
        gamma = 1 + (spd.GAMMA_END - 1) * min(1.0, step.share / spd.GAMMA_SHARE)
        errors = {
            "stochastic": spd.stochastic_error(module, look, y),
            "adversarial": (spd.shared_output(module, look, self.adversary) - y).square().sum(dim=1),
            "unmasked": (look.full - y).square().sum(dim=1),
        }
        terms = {name: error.mean() / module.output_variance for name, error in errors.items()}
        terms |= {"cp": self.cp(module, step.generator), "smooth_l0": spd.smooth_l0(look.score, gamma).mean()}
        loss = sum(weight * terms[name] for name, weight in spd.WEIGHTS.items()) + self.sparsity * terms["smooth_l0"]
        return loss, terms | {"l0": (look.importance > 0).sum(dim=1).float().mean()}
