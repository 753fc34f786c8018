"""The sparse modules that replace an MLP. All read x (tokens, d_in) and give y (tokens, d_out) in the store's units.

    topk         y = D topk(relu(E (x - mean) + b_e)) + b_d
    gated-topk   y = sum over the k largest |h_c| |p_c| of h_c p_c + b,   h_c = act(u_c.x + a_c) (v_c.x + b_c)

Inside, inputs and outputs are divided by scalar scales that are powers of two, so that moving them into or out of the
weights is exact. A row c of every matrix here belongs to latent c; copies of one neuron (siblings) are neighbours.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache.weights import ACTIVATIONS, MLP


class Output(NamedTuple):
    reconstruction: Tensor  # (tokens, d_out)
    code: Tensor  # (tokens, C), 0 where a latent is inactive


def power_of_two(value: float) -> float:
    """The power of two nearest to `value` (by ratio): multiplying by it rounds nothing."""
    return float(2.0 ** torch.tensor(value).log2().round().item())


class Scaled(nn.Module):
    """Scalar scales around a module, and its parents: what all modules share."""

    def __init__(self, in_scale: float, out_scale: float, parents: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("in_scale", torch.tensor(in_scale))
        self.register_buffer("out_scale", torch.tensor(out_scale))
        self.register_buffer("parents", parents)  # (C,) original neuron of each latent, or None


class TopK(Scaled):
    """Ungated transcoder: the k largest pre-activations of each token, where they are positive."""

    def __init__(self, encoder: Tensor, decoder: Tensor, *, k: int, input_mean: Tensor, output_mean: Tensor,
                 in_scale: float = 1.0, out_scale: float = 1.0, parents: Tensor | None = None) -> None:  # fmt: skip
        super().__init__(in_scale, out_scale, parents)
        self.k = check_k(k, len(encoder))
        self.register_buffer("input_mean", input_mean)  # (d_in,) in the store's units
        self.encoder = nn.Parameter(encoder)  # (C, d_in)
        self.encoder_bias = nn.Parameter(torch.zeros(len(encoder)))
        self.decoder = nn.Parameter(decoder)  # (C, d_out)
        self.decoder_bias = nn.Parameter(output_mean / out_scale)  # (d_out,)

    def forward(self, x: Tensor) -> Output:
        pre = F.linear((x - self.input_mean) / self.in_scale, self.encoder, self.encoder_bias)  # (tokens, C)
        values, chosen = pre.topk(self.k, dim=1, sorted=False)
        code = torch.zeros_like(pre).scatter(1, chosen, values.relu())
        return Output((code @ self.decoder + self.decoder_bias) * self.out_scale, code)

    def as_mlp(self) -> MLP:
        """The dense ReLU MLP that this module thins out, in the store's units."""
        encoder = self.encoder / self.in_scale
        bias = self.encoder_bias - encoder @ self.input_mean
        return MLP(
            "relu", encoder, self.decoder.T * self.out_scale, up_bias=bias, down_bias=self.decoder_bias * self.out_scale
        )


class Triples(Scaled):
    """Components p_c (x) u_c (x) v_c with the MLP's own activation: what gated transcoders and SPD share.

    `mlp` holds the wide matrices in the store's units (`train.init`).
    """

    def __init__(
        self, mlp: MLP, *, in_scale: float = 1.0, out_scale: float = 1.0, parents: Tensor | None = None
    ) -> None:
        super().__init__(in_scale, out_scale, parents)
        self.activation = mlp.activation
        self.gate = nn.Parameter(mlp.gate * in_scale)  # (C, d_in)
        self.up = nn.Parameter(mlp.up * in_scale)  # (C, d_in)
        self.down = nn.Parameter((mlp.down / out_scale).T.contiguous())  # (C, d_out)
        for name, bias in (("gate_bias", mlp.gate_bias), ("up_bias", mlp.up_bias)):
            self.register_parameter(name, None if bias is None else nn.Parameter(bias.clone()))
        bias = torch.zeros(mlp.down.shape[0]) if mlp.down_bias is None else mlp.down_bias / out_scale
        self.down_bias = nn.Parameter(bias)  # (d_out,)

    def hidden(self, x: Tensor) -> Tensor:
        """h (tokens, C) of x in the store's units."""
        x = x / self.in_scale
        gate = ACTIVATIONS[self.activation](F.linear(x, self.gate, self.gate_bias))
        return gate * F.linear(x, self.up, self.up_bias)

    def decode(self, code: Tensor) -> Tensor:
        return (code @ self.down + self.down_bias) * self.out_scale

    def as_mlp(self) -> MLP:
        """The weights as one gated MLP in the store's units: all of its components, no mask."""
        return MLP(
            self.activation, self.up / self.in_scale, self.down.T * self.out_scale, self.gate / self.in_scale,
            self.gate_bias, self.up_bias, self.down_bias * self.out_scale,
        )  # fmt: skip


class GatedTopK(Triples):
    """Gated transcoder. With `family` > 1 only the largest of every `family` neighbouring siblings may fire.

    Without that rule siblings, nearly equal at the start, take k places for one neuron's job: measured FVU at step 0
    8.0 against 0.175 (k=32, one real layer).
    """

    def __init__(self, mlp: MLP, *, k: int, family: int = 1, **scales) -> None:
        super().__init__(mlp, **scales)
        self.family = family
        self.k = check_k(k, len(self.gate) // family)

    def forward(self, x: Tensor) -> Output:
        h = self.hidden(x)  # (tokens, C)
        with torch.no_grad():
            contribution = h.abs() * self.down.norm(dim=1)
            families = contribution.unflatten(1, (-1, self.family))  # (tokens, C / family, family)
            best, sibling = families.max(dim=2)
            parents = best.topk(self.k, dim=1, sorted=False).indices  # (tokens, k)
            chosen = parents * self.family + sibling.gather(1, parents)
        code = torch.zeros_like(h).scatter(1, chosen, h.gather(1, chosen))
        return Output(self.decode(code), code)


def check_k(k: int, width: int) -> int:
    """ValueError if more latents are asked for than can fire."""
    if k > width:
        raise ValueError(
            f"k is {k} and at most {width} latents can fire at once: choose --k up to {width}, or a larger --expansion"
        )
    return k
