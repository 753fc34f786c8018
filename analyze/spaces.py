"""The coordinates of a report: where its eigenvectors live and how tokens enter and leave them.

The MLP reads x = gain * r, r the residual stream divided by its norm. Folding the gain into gate and up moves the
analysis to r: there |r|^2 = d for every token, so an eigenvalue's size compares with the trace, and a read direction q
meets a token's embedding directly. In the space of x the same read direction is gain * q on the residual stream.
A pre-norm with a bias, or none, leaves the analysis in the space of x, since x is then not a multiple of r.
"""

from dataclasses import dataclass

from torch import Tensor

from cache.weights import MLP, Head, Norm

SMALLEST_GAIN = 1e-4  # of the largest: below it stored 16-bit inputs are too coarse to be divided back


@dataclass(frozen=True)
class Space:
    """Input coordinates; `gain` None means the MLP's own input x."""

    gain: Tensor | None
    norm: Norm | None

    @property
    def name(self) -> str:
        return "MLP input x" if self.gain is None else "normalised residual r = x / gain"

    def enter(self, x: Tensor) -> Tensor:
        """MLP inputs (tokens, d) in these coordinates."""
        return x if self.gain is None else x / self.gain

    def embed(self, embedding: Tensor) -> Tensor:
        """Embedding rows (vocabulary, d), normalised to unit RMS as the pre-norm would, in these coordinates."""
        rows = embedding.float()
        if self.norm is not None and self.norm.kind == "layer":
            rows = rows - rows.mean(1, keepdim=True)
        rows = rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
        if self.gain is not None or self.norm is None:
            return rows
        rows = rows * self.norm.gain.float()
        return rows if self.norm.bias is None else rows + self.norm.bias.float()


def choose_space(mlp: MLP) -> Space:
    """The normalised residual where the pre-norm is a plain gain, the MLP's input otherwise."""
    norm = mlp.pre_norm
    if norm is None or (norm.bias is not None and bool(norm.bias.any())):
        return Space(None, norm)
    gain = norm.gain.detach().double()
    usable = gain.abs().min() > SMALLEST_GAIN * gain.abs().max()
    return Space(gain if usable else None, norm)


def readout(head: Head, mlp: MLP) -> Tensor | None:
    """Rows that turn an output of the MLP into logits above their mean (vocabulary, d_out); None if widths differ.

    Post-norm and final norm are taken as their gains: their division by a norm scales all logits alike.
    """
    rows = head.unembedding.float()
    if rows.shape[1] != mlp.down.shape[0]:
        return None
    rows = rows - rows.mean(0)
    for norm in (head.final_norm, mlp.post_norm):
        if norm is not None:
            rows = rows * norm.gain.float()
            rows = rows - rows.mean(1, keepdim=True) if norm.kind == "layer" else rows
    return rows
