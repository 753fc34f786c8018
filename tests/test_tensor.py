"""The algebra of CP tensors against dense tensors small enough to write down."""

import dataclasses

import pytest
import torch

from analyze.tensor import functional_cosine, functional_inner, input_gram, interaction_matrix, output_gram
from cache.weights import MLP
from train.tensor import CPTensor, augmented, cosine, inner, relative_distance, squared_norm

D, M, OUT = 24, 40, 20


def random_mlp(seed: int = 0, activation: str = "silu", biases: bool = False, d: int = D, m: int = M) -> MLP:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    bias = {"gate_bias": draw(m), "up_bias": draw(m)} if biases else {}
    return MLP(activation=activation, gate=draw(m, d), up=draw(m, d), down=draw(OUT, m), **bias)


def random_tensor(seed: int = 0) -> CPTensor:
    tensor = CPTensor.of_mlp(random_mlp(seed))
    return dataclasses.replace(tensor, weight=torch.linspace(0.5, 2, M, dtype=torch.float64))


def dense(tensor: CPTensor) -> torch.Tensor:
    raw = torch.einsum("oi,ia,ib->oab", tensor.written, tensor.gate, tensor.up)
    return (raw + raw.transpose(1, 2)) / 2  # (d_out, d, d)


def inputs(n: int = 50, seed: int = 9) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expanded(mlp: MLP, copies: int) -> MLP:
    return dataclasses.replace(
        mlp, gate=mlp.gate.repeat(copies, 1), up=mlp.up.repeat(copies, 1), down=mlp.down.repeat(1, copies) / copies
    )


def close(a, b, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


def test_quadratic_form_of_a_direction_is_that_output():
    tensor, x = random_tensor(), inputs()
    direction = torch.randn(OUT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = interaction_matrix(tensor, direction)
    close(((x @ matrix) * x).sum(1), tensor.apply(x) @ direction)
    close(matrix, matrix.T)
    close(matrix, torch.einsum("o,oab->ab", direction, dense(tensor)))


def test_weight_one_tensor_is_the_bilinear_mlp():
    mlp = random_mlp(activation="identity")
    close(CPTensor.of_mlp(mlp).apply(inputs()), mlp(inputs()))


def test_spectrum_ignores_exchange_and_scale_of_the_factors():
    tensor, direction = random_tensor(), torch.ones(OUT, dtype=torch.float64)
    values = torch.linalg.eigvalsh(interaction_matrix(tensor, direction))
    swapped = dataclasses.replace(tensor, gate=tensor.up, up=tensor.gate)
    scale = torch.linspace(-3, 3, M, dtype=torch.float64)[:, None] + 0.01
    scaled = dataclasses.replace(tensor, gate=tensor.gate * scale, up=tensor.up / scale)
    close(torch.linalg.eigvalsh(interaction_matrix(swapped, direction)), values)
    close(torch.linalg.eigvalsh(interaction_matrix(scaled, direction)), values, 1e-10)


def test_unsymmetrised_matrix_would_give_another_spectrum():
    tensor, direction = random_tensor(), torch.ones(OUT, dtype=torch.float64)
    raw = tensor.gate.T @ ((direction @ tensor.written)[:, None] * tensor.up)
    right = torch.linalg.eigvalsh(interaction_matrix(tensor, direction))
    wrong = torch.linalg.eigvalsh(raw)  # reads one triangle, silently
    assert (wrong - right).norm() > 0.1 * right.norm()


def test_even_part_of_swiglu_is_half_the_bilinear_map():
    mlp, x = random_mlp(), inputs()
    close((mlp(x) + mlp(-x)) / 2, CPTensor.of_mlp(mlp).apply(x) / 2)


def test_bilinear_map_is_a_swiglu_of_twice_the_width():
    mlp, x = random_mlp(), inputs()
    wide = MLP(
        activation="silu",
        gate=torch.cat([mlp.gate, -mlp.gate]),
        up=torch.cat([mlp.up, mlp.up]),
        down=torch.cat([mlp.down, -mlp.down], 1),
    )
    close(wide(x), CPTensor.of_mlp(mlp).apply(x))


def test_expansion_leaves_function_and_tensor_fixed():
    mlp, x = random_mlp(), inputs()
    wide = expanded(mlp, 4)
    close(wide(x), mlp(x))
    assert relative_distance(CPTensor.of_mlp(wide), CPTensor.of_mlp(mlp)) < 1e-7
    doubled_gate = dataclasses.replace(wide, gate=wide.gate * 2, down=wide.down / 2)
    assert (doubled_gate(x) - mlp(x)).norm() > 0.05 * mlp(x).norm()  # the sigmoid sees the gate's scale


def test_inner_products_match_the_dense_tensors(monkeypatch):
    a, b = random_tensor(0), random_tensor(1)
    for entries in (2**23, 3 * M):  # one block, many blocks
        monkeypatch.setattr("train.tensor.BLOCK_ENTRIES", entries)
        close(inner(a, b), (dense(a) * dense(b)).sum(), 1e-10)
        close(squared_norm(a), dense(a).square().sum(), 1e-10)
        close(relative_distance(a, b), float((dense(a) - dense(b)).norm() / dense(b).norm()), 1e-10)
        close(cosine(a, b), float((dense(a) * dense(b)).sum() / dense(a).norm() / dense(b).norm()), 1e-10)


def test_output_and_input_grams_match_the_dense_tensor(monkeypatch):
    tensor = random_tensor()
    full = dense(tensor)
    for entries in (2**23, 3 * M):
        monkeypatch.setattr("train.tensor.BLOCK_ENTRIES", entries)
        close(output_gram(tensor), torch.einsum("oab,pab->op", full, full), 1e-10)
        close(input_gram(tensor), torch.einsum("oab,oac->bc", full, full), 1e-10)


def test_functional_inner_product_is_the_gaussian_mean():
    a, b = random_tensor(0), random_tensor(1)
    x = inputs(200_000)
    sampled = (a.apply(x) * b.apply(x)).sum(1)
    error = sampled.std() / len(x) ** 0.5
    assert abs(sampled.mean() - functional_inner(a, b)) < 5 * error
    assert abs((a.apply(x).square().sum(1)).mean() / functional_inner(a, a) - 1) < 0.02
    close(functional_cosine(a, a), 1.0)


def test_folding_the_gain_is_a_congruence():
    tensor, gain = random_tensor(), torch.linspace(0.2, 2, D, dtype=torch.float64)
    direction, x = torch.ones(OUT, dtype=torch.float64), inputs()
    folded = tensor.fold(gain)
    close(interaction_matrix(folded, direction), gain[:, None] * interaction_matrix(tensor, direction) * gain)
    close(folded.apply(x / gain), tensor.apply(x))


def test_zero_mean_quadratic_coefficient_of_silu_is_one_half():
    # L2-best quadratic form of act(u.x)(v.x) under N(0, Sigma) in three dimensions, by Gauss-Hermite quadrature.
    import numpy as np

    nodes, weights = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(40))
    weights = weights / weights.sum()
    white = torch.cartesian_prod(nodes, nodes, nodes)  # (q, 3)
    mass = torch.cartesian_prod(weights, weights, weights).prod(1)
    root = torch.tensor([[0.9, 0, 0], [0.3, 0.7, 0], [-0.2, 0.1, 0.8]], dtype=torch.float64)
    x = white @ root.T  # Sigma = root root^T
    u, v = torch.tensor([[0.5, -0.3, 0.4], [0.2, 0.6, -0.5]], dtype=torch.float64)
    target = torch.nn.functional.silu(x @ u) * (x @ v)
    products = (x[:, :, None] * x[:, None, :]).flatten(1)[:, [0, 1, 2, 4, 5, 8]]
    design = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x, products], 1) * mass[:, None].sqrt()
    fitted = torch.linalg.lstsq(design, target * mass.sqrt()).solution[4:]
    half = torch.outer(u, v) / 2
    full = (half + half.T)[[0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]  # coefficients of x_a x_b, a < b counted twice
    expected = full * torch.tensor([0.5, 1, 1, 0.5, 1, 0.5], dtype=torch.float64)
    close(fitted, expected, 1e-6)


def test_biases_become_weights_over_one_and_x():
    mlp, x = random_mlp(activation="identity", biases=True), inputs()
    close(augmented(mlp).apply(torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x], 1)), mlp(x))


def test_ungated_mlp_has_no_tensor_unless_its_density_is_given():
    gated = random_mlp()
    mlp = dataclasses.replace(gated, gate=None, activation="relu")
    with pytest.raises(ValueError, match="an ungated MLP with activation relu has no quadratic form: give a gated MLP"):
        CPTensor.of_mlp(mlp)
    tensor = CPTensor.of_mlp(mlp, density=torch.full((M,), 0.4, dtype=torch.float64))
    close(tensor.apply(inputs()), 0.2 * (inputs() @ mlp.up.T).square() @ mlp.down.T)


def test_quadratic_coefficient_of_relu_is_half_its_density_at_zero():
    # y = relu(z), z ~ N(b, s^2): the L2-best quadratic's coefficient of (z - b)^2 is pdf(0) / 2.
    import numpy as np

    mean, scale = 0.3, 0.8
    z = np.linspace(mean - 9 * scale, mean + 9 * scale, 200_001)
    mass = np.exp(-((z - mean) ** 2) / (2 * scale**2))
    mass /= mass.sum()
    design = np.stack([np.ones_like(z), z, z**2], 1) * np.sqrt(mass)[:, None]
    fitted = np.linalg.lstsq(design, np.maximum(z, 0) * np.sqrt(mass), rcond=None)[0][2]
    density = np.exp(-(mean**2) / (2 * scale**2)) / (scale * np.sqrt(2 * np.pi))
    assert abs(fitted - density / 2) < 1e-5
