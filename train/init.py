"""Where a module starts. `expansion` copies the MLP's own neurons; `random` is what it is compared with.

    module       init        read vectors (u, v, e)                     write vectors (p, d)            biases
    spd          expansion   copied, noised (zero-sum over siblings)    copied, divided by E, noised    copied
    gated-topk   expansion   copied, noised (zero-sum over siblings)    copied, noised                  copied
    topk         expansion   unit rows +-u^ +-v^ of a gated neuron,     0.1 x unit +-p                  0, mean output
                             unit v of an ungated one; noised
    spd, gated   random      Gaussian of unit variance per token        0.1 x unit, spd: 1/sqrt(C)      0
    topk         random      unit Gaussian rows                         0.1 x unit                      0, mean output

The 1/E goes on p alone: u cannot be scaled (the gate sees it). Noise that sums to zero over the siblings changes the
module's output in second order only. Triples of E=1 get no noise: there is no sibling to tell apart.
"""

import dataclasses

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from cache.weights import MLP

DECODER_NORM = 0.1  # of a TopK latent at the start: small, so that the first steps set its direction


def expand(mlp: MLP, expansion: int, *, noise: float, divide: bool, generator: Generator) -> MLP:
    """`expansion` neighbouring copies of every neuron; `divide` shares its output among them.

    Noise is relative to the standard deviation of each matrix and sums to zero over the siblings.
    """
    copies = {
        name: _siblings(getattr(mlp, name), expansion, noise, generator)
        for name in ("gate", "up")
        if getattr(mlp, name) is not None
    }
    down = _siblings(mlp.down.T / (expansion if divide else 1), expansion, noise, generator).T
    biases = {
        name: getattr(mlp, name).repeat_interleave(expansion)
        for name in ("gate_bias", "up_bias")
        if getattr(mlp, name) is not None
    }
    return dataclasses.replace(mlp, down=down, pre_norm=None, post_norm=None, **copies, **biases)


def _siblings(rows: Tensor, expansion: int, noise: float, generator: Generator) -> Tensor:
    copies = rows.repeat_interleave(expansion, dim=0)  # (m * E, d)
    if expansion == 1 or noise == 0:
        return copies
    drawn = torch.randn(copies.shape, generator=generator).unflatten(0, (-1, expansion))
    drawn = (drawn - drawn.mean(dim=1, keepdim=True)).flatten(0, 1)
    return copies + noise * rows.std() * drawn


def random_triples(
    mlp: MLP, width: int, *, in_scale: float, out_scale: float, down_norm: float, generator: Generator
) -> MLP:
    """A gated MLP of `width` random neurons: z and w of about unit variance, |p| = `down_norm` in normalised units."""
    d_in, d_out = mlp.up.shape[1], mlp.down.shape[0]
    gate, up = (torch.randn(width, d_in, generator=generator) / d_in**0.5 / in_scale for _ in range(2))
    down = F.normalize(torch.randn(width, d_out, generator=generator)) * down_norm * out_scale
    return MLP(mlp.activation, up, down.T, gate, down_bias=mlp.down_bias)


def latents_of_neurons(mlp: MLP, expansion: int, *, noise: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Encoder and decoder rows of an ungated transcoder, `expansion` neighbouring latents per neuron.

    The quadratic form of a gated neuron has the eigenvectors u^ + v^ (positive) and u^ - v^ (negative), and a form sees
    both signs of x: the four latents are (u^+v^ -> p), (u^-v^ -> -p), (-u^-v^ -> p), (-u^+v^ -> -p).
    """
    if mlp.gated:
        u, v, p = F.normalize(mlp.gate), F.normalize(mlp.up), F.normalize(mlp.down.T)
        reads, writes = [u + v, u - v, -u - v, v - u], [p, -p, p, -p]
    else:
        reads, writes = [mlp.up], [mlp.down.T]
    encoder, decoder = (
        torch.stack([F.normalize(rows[i % len(rows)]) for i in range(expansion)], dim=1).flatten(0, 1)
        for rows in (reads, writes)
    )
    encoder = encoder + noise * torch.randn(encoder.shape, generator=generator) / encoder.shape[1] ** 0.5
    return encoder, DECODER_NORM * decoder


def random_latents(width: int, d_in: int, d_out: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
    encoder = F.normalize(torch.randn(width, d_in, generator=generator))
    return encoder, DECODER_NORM * F.normalize(torch.randn(width, d_out, generator=generator))
