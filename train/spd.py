"""SPD over triples: the MLP as a sum of components, each with a learned importance k_c(x) in [0, 1].

    y(m) = sum_c m_c h_c p_c + b,   h_c = act(u_c.x + a_c) (v_c.x + b_c),   any mask m_c in [k_c(x), 1] should do

At full mask (m = 1) the expanded module is the MLP itself; an importance below 1 says how far a component may be
closed on this input without harm. One mask per component makes y linear in m, so the stochastic loss of Bushnaq et
al. (2025) is known in closed form and the adversary's gradient analytically (derived in this project; tested against
sampling and autograd).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache.weights import MLP

from .modules import Output, Triples
from .tensor import augmented, factors, squared_norm

LEAK = 0.01  # slope outside [0, 1] in the backward pass (Bushnaq et al. 2025)
SELF_GATE = 50.0  # a component that carries 2 % of the output's standard deviation moves its own importance by 1
ASCENTS, ASCENT_STEP = 2, 0.1  # of the shared adversary, per training step
PROBES = 256  # Gaussian probes of the tensor distance: relative standard deviation about 0.9 / sqrt(256)
GAMMA_END, GAMMA_SHARE = 0.01, 0.9  # smooth L0: gamma from 1 to 0.01 over the first 90 % of the run
WEIGHTS = {"stochastic": 0.5, "adversarial": 0.5, "unmasked": 0.5, "cp": 0.5}


class LowerLeaky(torch.autograd.Function):
    """Clamp to [0, 1]; the gradient passes inside, is 0 above 1, and leaks at or below 0 only where it would raise s."""

    @staticmethod
    def forward(ctx, s: Tensor) -> Tensor:
        ctx.save_for_backward(s)
        return s.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (s,) = ctx.saved_tensors
        leak = torch.where((s <= 0) & (grad < 0), LEAK * grad, torch.zeros_like(grad))
        return torch.where((s > 0) & (s <= 1), grad, leak)


def lower_leaky(s: Tensor) -> Tensor:
    """Importances for masks."""
    return LowerLeaky.apply(s)


def upper_leaky(s: Tensor) -> Tensor:
    """Importances for the sparsity loss: 0 below 0, s on [0, 1], slope 0.01 above."""
    return torch.where(s > 1, 1 + LEAK * (s - 1), s.clamp_min(0))


def smooth_l0(score: Tensor, gamma: float) -> Tensor:
    """Number of importances well above gamma, per token: sum of g^2 / (g^2 + gamma^2), g the upper-leaky importance."""
    square = upper_leaky(score).square()
    return (square / (square + gamma**2)).sum(dim=1)


class Look(NamedTuple):
    """What all masks share on one batch. The output is linear in the mask, so two outputs give the mean over masks."""

    h: Tensor  # (tokens, C)
    importance: Tensor  # (tokens, C) in [0, 1]
    score: Tensor  # (tokens, C) before squashing
    free: Tensor  # (tokens, C) the part of h that a mask may take away: (1 - importance) h
    full: Tensor  # (tokens, d_out) output at m = 1
    low: Tensor  # (tokens, d_out) output at m = importance


class Spd(Triples):
    """Components with importances from their own contribution and a linear map of x:

    s_c = a_c 50 |h_c| |p_c| / sqrt(Var y) + A_c.x + c_c, which starts at 1: everything open.
    """

    def __init__(self, mlp: MLP, *, output_variance: float, **scales) -> None:
        super().__init__(mlp, **scales)
        width, d_in = self.gate.shape
        self.down_bias.requires_grad_(False)  # frozen: the sum of components is the claim, not a free offset
        self.register_buffer("output_variance", torch.tensor(output_variance))  # E|y - mean|^2, store's units
        self.self_gate = nn.Parameter(torch.zeros(width))
        self.gate_map = nn.Parameter(torch.zeros(width, d_in))
        self.gate_offset = nn.Parameter(torch.ones(width))

    def look(self, x: Tensor) -> Look:
        h = self.hidden(x)
        deviation = self.output_variance.sqrt() / self.out_scale
        per_contribution = self.self_gate * (SELF_GATE / deviation) * self.down.norm(dim=1)  # (C,)
        score = h.abs() * per_contribution + F.linear(x / self.in_scale, self.gate_map, self.gate_offset)
        importance = lower_leaky(score)
        kept = h * importance
        return Look(h, importance, score, h - kept, self.decode(h), self.decode(kept))

    def forward(self, x: Tensor) -> Output:
        """The module as used: every mask at its lowest, m = k(x)."""
        look = self.look(x)
        return Output(look.low, look.h * look.importance)


def stochastic_error(module: Spd, look: Look, y: Tensor) -> Tensor:
    """E over r ~ U(0,1)^C of |y(k + (1-k) r) - y|^2 per token (tokens,): bias^2 of the mean mask, plus variance."""
    mean = (look.full + look.low) / 2 - y
    norms = (module.down * module.out_scale).square().sum(dim=1)
    return mean.square().sum(dim=1) + look.free.square() @ norms / 12


def shared_output(module: Spd, look: Look, r: Tensor) -> Tensor:
    """Output (tokens, d_out) at m = k + (1-k) r with one r (C,) for all tokens: r joins the write vectors."""
    return look.low + look.free @ (r[:, None] * module.down * module.out_scale)


def adversary_gradient(module: Spd, look: Look, y: Tensor, r: Tensor) -> Tensor:
    """d/dr (C,) of the mean over tokens of |shared_output - y|^2."""
    error = shared_output(module, look, r) - y
    return 2 / len(y) * ((look.free.T @ error) * module.down).sum(dim=1) * module.out_scale


@torch.no_grad()
def ascend(module: Spd, look: Look, y: Tensor, r: Tensor, steps: int) -> Tensor:
    """r after `steps` sign ascents, kept in [0, 1]."""
    for _ in range(steps):
        r = (r + ASCENT_STEP * adversary_gradient(module, look, y, r).sign()).clamp(0, 1)
    return r


class CPDistance(nn.Module):
    """Relative squared distance of the module's symmetrised tensor to the MLP's, estimated with Gaussian probes.

    For x, x' ~ N(0, I) the squared difference of sum_c p_c ((u.x)(v.x') + (u.x')(v.x)) / 2 has the squared tensor
    distance as its mean. The subtraction comes first, so there is no cancellation as in the exact Gram form.
    Biases are weights of the constant input, as in `train.tensor.factors`.
    """

    def __init__(self, target: MLP) -> None:
        super().__init__()
        for name, rows in zip(("gate", "up", "down"), factors(target), strict=True):
            self.register_buffer(name, rows, persistent=False)
        self.squared_norm = float(squared_norm(augmented(target)))

    def forward(self, module: Spd, generator: torch.Generator) -> Tensor:
        with torch.autocast(self.gate.device.type, enabled=False):  # the two maps differ by less than bfloat16 resolves
            rows = factors(module.as_mlp())
            probes = torch.randn(2, PROBES, rows[0].shape[1], generator=generator).to(rows[0])
            difference = _contract(*rows, probes) - _contract(self.gate, self.up, self.down, probes)
            return difference.square().sum(dim=1).mean() / self.squared_norm


def _contract(gate: Tensor, up: Tensor, down: Tensor, probes: Tensor) -> Tensor:
    (z, z2), (w, w2) = probes @ gate.T, probes @ up.T
    return (z * w2 + z2 * w) @ down / 2
