"""Spectra, effective ranks, HOSVD and truncation against what can be worked out by hand or densely."""

import numpy as np
import torch

from analyze.spectra import (
    Spectrum,
    direction_spectrum,
    effective_ranks,
    hosvd,
    local_spectrum,
    null_summary,
    null_tensor,
    pairs_for_share,
    spectrum,
    truncation_curve,
)
from analyze.tensor import interaction_matrix
from train.tensor import CPTensor, squared_norm

F64 = torch.float64


def random_tensor(d: int = 24, n: int = 40, d_out: int = 20, seed: int = 0) -> CPTensor:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    return CPTensor(draw(d_out, n), draw(n, d), draw(n, d), draw(n).abs())


def close(a, b, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


def test_one_neuron_has_two_eigenvalues_and_known_eigenvectors():
    tensor = random_tensor(n=1)
    u, v, c = tensor.gate[0], tensor.up[0], tensor.written[3, 0]
    direction = torch.zeros(20, dtype=F64)
    direction[3] = 1
    pairs = direction_spectrum(tensor, direction)
    expected = torch.stack([c * (u @ v + u.norm() * v.norm()), c * (u @ v - u.norm() * v.norm())]) / 2
    close(pairs.values[[0, -1]], expected.sort(descending=True).values)
    close(pairs.values[1:-1], torch.zeros(22, dtype=F64))
    for sign in (1, -1):
        vector = u / u.norm() + sign * v / v.norm()
        vector = vector / vector.norm()
        column = 0 if (sign > 0) == (c > 0) else -1
        close((vector @ pairs.vectors[:, column]).abs(), torch.tensor(1.0, dtype=F64))


def test_pairs_rebuild_the_matrix_and_come_largest_first():
    matrix = interaction_matrix(random_tensor(), torch.ones(20, dtype=F64))
    pairs = spectrum(matrix)
    close(pairs.vectors * pairs.values @ pairs.vectors.T, matrix, 1e-10)
    assert (pairs.values.diff() <= 0).all()
    close(pairs.trace, float(matrix.trace()), 1e-10)
    close(pairs.norm, float(matrix.norm()), 1e-10)
    eye = torch.eye(24, dtype=F64)
    close(pairs.traceless, spectrum(matrix - matrix.trace() / 24 * eye).values, 1e-10)


def test_both_ends_hold_only_their_own_sign():
    pairs = Spectrum(torch.tensor([3.0, 1.0, 0.0, -2.0]), torch.eye(4))
    assert pairs.ends(2) == ([0, 1], [3])
    assert pairs.ends(9) == ([0, 1], [3])
    assert pairs.by_size().values.tolist() == [3.0, -2.0, 1.0, 0.0]


def test_effective_ranks_by_hand():
    ones = effective_ranks(torch.tensor([1.0, -1, 1, -1], dtype=F64))
    assert ones == {"absolute": 4.0, "participation": 4.0, "stable": 4.0}
    mixed = effective_ranks(torch.tensor([2.0, 1, -1, 0], dtype=F64))
    close(mixed["absolute"], 16 / 6)
    close(mixed["participation"], 36 / 18)
    close(mixed["stable"], 6 / 4)
    assert effective_ranks(torch.zeros(3, dtype=F64))["stable"] == 0


def test_pairs_for_ninety_percent_by_hand():
    values = torch.tensor([-3.0, 1.0, 0.1], dtype=F64)
    assert pairs_for_share(values, 0.89) == 1  # 9 / 10.01
    assert pairs_for_share(values, 0.9) == 2
    assert pairs_for_share(values, 1.0) == 3
    assert pairs_for_share(torch.ones(10, dtype=F64)) == 9


def test_structureless_spectrum_has_the_semicircle_ranks():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(400, 400, generator=generator, dtype=F64)
    ranks = effective_ranks(spectrum((raw + raw.T) / 2).values)
    assert abs(ranks["absolute"] / 400 - (8 / (3 * np.pi)) ** 2) < 0.02
    assert abs(ranks["participation"] / 400 - 0.5) < 0.02


def test_nulls_are_seeded_and_keep_shape_and_norm():
    tensor = random_tensor()
    first, again, other = (null_tensor(tensor, seed) for seed in (0, 0, 1))
    close(squared_norm(first), squared_norm(tensor), 1e-10)
    assert torch.equal(first.gate, again.gate) and not torch.equal(first.gate, other.gate)
    assert null_summary(tensor, 0) == null_summary(tensor, 0)
    wide = null_summary(random_tensor(d=120, n=420, d_out=5), 0)  # m = 3.5 d: 0.66 d and 0.41 d
    assert abs(wide["absolute"] / 120 - 0.66) < 0.04 and abs(wide["participation"] / 120 - 0.41) < 0.06


def test_hosvd_is_the_svd_of_the_unfolding():
    tensor = random_tensor()
    raw = torch.einsum("oi,ia,ib->oab", tensor.written, tensor.gate, tensor.up)
    left, sigma, _ = np.linalg.svd(((raw + raw.transpose(1, 2)) / 2).reshape(20, -1).numpy(), full_matrices=False)
    values, vectors = hosvd(tensor)
    close(values, torch.from_numpy(sigma), 1e-9)
    close((vectors * torch.from_numpy(left)).sum(0).abs(), torch.ones(20, dtype=F64), 1e-8)
    for s in (0, 5):
        close(direction_spectrum(tensor, vectors[:, s]).norm, float(values[s]), 1e-10)


def test_compressed_spectrum_is_the_dense_one():
    tensor, direction = random_tensor(), torch.ones(20, dtype=F64)
    for active in (torch.tensor([3, 7, 11, 30]), torch.arange(20)):  # 2k < d and 2k > d
        part = CPTensor(tensor.down[:, active], tensor.gate[active], tensor.up[active], tensor.weight[active])
        dense = direction_spectrum(part, direction)
        small = local_spectrum(tensor, direction, active)
        strong = dense.values[dense.values.abs() > 1e-10]
        close(small.values[small.values.abs() > 1e-10], strong, 1e-10)
        rebuilt = small.vectors * small.values @ small.vectors.T
        close(rebuilt, interaction_matrix(part, direction), 1e-10)


def test_truncation_at_full_rank_is_exact_and_grows_on_the_way():
    tensor, direction = random_tensor(), torch.ones(20, dtype=F64)
    x = torch.randn(4000, 24, generator=torch.Generator().manual_seed(2), dtype=F64)
    truth = tensor.apply(x) @ direction + 1000  # a constant must not matter
    pairs = direction_spectrum(tensor, direction)
    curve = truncation_curve(pairs, [(x[:1500], truth[:1500]), (x[1500:1500], truth[:0]), (x[1500:], truth[1500:])])
    close(curve[-1], torch.tensor(1.0, dtype=F64), 1e-9)
    top = pairs.by_size()
    for k in (1, 5):
        terms = ((x @ top.vectors[:, :k]).square() * top.values[:k]).sum(1)
        close(curve[k - 1], torch.tensor(np.corrcoef(terms, truth)[0, 1], dtype=F64), 1e-8)


def test_truncation_of_nothing_is_not_a_number():
    pairs = Spectrum(torch.ones(3, dtype=F64), torch.eye(3, dtype=F64))
    assert truncation_curve(pairs, []).isnan().all()
