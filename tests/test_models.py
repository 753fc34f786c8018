"""Claims about finding MLPs: what the hooks hear is what the extracted matrices compute, in every family."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from cache import weights
from cache.models import find_mlps, find_norms, listen, load, read_head

SMALL = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3)  # fmt: skip
GPT2 = dict(vocab_size=50, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
FAMILIES = {
    "Llama": SMALL | {"mlp_bias": True},
    "Mistral": SMALL,
    "Qwen2": SMALL,
    "Gemma2": SMALL | {"head_dim": 8},
    "Olmo2": SMALL,
    "Phi3": SMALL | {"pad_token_id": 0},
    "GPT2": GPT2,
    "GPTJ": GPT2 | {"rotary_dim": 4},
    "GPTNeoX": SMALL,
    "OPT": dict(vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
                word_embed_proj_dim=16, max_position_embeddings=32, init_std=0.3),
    "Bloom": dict(vocab_size=50, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    name, options = request.param, FAMILIES[request.param]
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.no_grad():
        model = getattr(
            transformers, f"{name}{'LMHead' if name == 'GPT2' else 'ForCausal'}{'Model' if name == 'GPT2' else 'LM'}"
        )(config)
        for parameter in model.parameters():  # norms and biases start at 1 and 0: make each of them matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


IDS = torch.arange(2 * 8).view(2, 8)


def test_matrices_compute_what_the_hooks_hear(model):
    found = find_mlps(model)
    with listen(found) as run:
        heard = run(model, IDS)
    assert [one.layer for one in found] == [0, 1]
    for one in found:
        x, y = heard[one.layer, "input"], heard[one.layer, "output"]
        assert x.shape == y.shape == (16, 16)
        assert (one.mlp(x) - y).norm() / y.norm() < 1e-5


def test_the_pre_norm_is_the_one_that_made_the_input(model):
    found = find_mlps(model)
    norms = find_norms(model, found, IDS)
    with listen(found) as run:
        heard = run(model, IDS)
    for one in found:
        pre, post = norms[one.layer]
        name = type(model).__name__
        assert (pre is None) == name.startswith("Olmo2")
        assert (post is not None) == name.startswith(("Olmo2", "Gemma2"))
        if pre is not None:
            x = heard[one.layer, "input"]
            bare = (x - (0 if pre.bias is None else pre.bias)) / pre.gain  # of rms 1, and of mean 0 after a LayerNorm
            assert torch.allclose(bare.square().mean(1), torch.ones(16), atol=1e-3)
            assert pre.kind == ("layer" if bare.mean(1).abs().max() < 1e-4 else "rms")
            assert pre.shared == name.startswith("GPTJ")


def test_the_head_gives_the_models_logits(model):
    head, heard = read_head(model, IDS), {}
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: heard.update(x=a[0], logits=out, bias=m.bias))
    model(IDS)
    bias = 0 if heard["bias"] is None else heard["bias"]
    assert torch.allclose(F.linear(heard["x"], head.unembedding), heard["logits"] - bias, atol=1e-4)
    bare = (heard["x"] - (0 if head.final_norm.bias is None else head.final_norm.bias)) / head.final_norm.gain
    assert torch.allclose(bare.square().mean(-1), torch.ones(2, 8), atol=1e-3)


def test_the_forward_pass_stops_after_the_last_layer_asked_for(model):
    ran = []
    found = find_mlps(model)
    found[1].down.register_forward_hook(lambda *a: ran.append(1))
    with listen(found[:1]) as run:
        assert set(run(model, IDS)) == {(0, "input"), (0, "output")}
    assert ran == []


def test_an_unknown_model_is_named_with_its_modules():
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ValueError, match="MambaForCausalLM has no MLP of a known form among its modules .*MambaMixer"):
        find_mlps(transformers.MambaForCausalLM(config))


def test_weights_survive_the_file(tmp_path, model):
    found = find_mlps(model)
    pre, post = find_norms(model, found, IDS)[0]
    mlp = weights.replace(found[0].mlp, pre_norm=pre, post_norm=post)
    weights.save(mlp, tmp_path / "m.safetensors")
    back = weights.load(tmp_path / "m.safetensors")
    assert (back.activation, back.gated, back.pre_norm and back.pre_norm.kind) == (
        mlp.activation,
        mlp.gated,
        pre and pre.kind,
    )
    x = torch.randn(4, 16)
    assert torch.equal(back(x), mlp(x))
    assert pre is None or torch.equal(back.pre_norm.gain, pre.gain)


def test_mixtures_of_experts_and_encoder_decoders_are_refused(tmp_path, model_folder):
    small = SMALL | {
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    }
    with pytest.raises(ValueError, match="Qwen2MoeForCausalLM is a mixture of experts .*: give a dense model"):
        find_mlps(transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**small)))
    config = transformers.BartConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
                                     decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2)  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="could not be loaded .* it is an encoder-decoder, and this reads decoders"
    ):
        load(str(tmp_path), torch.float32, "cpu")


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "identity"])
def test_native_gate_is_activation_over_input(name):
    z = torch.linspace(-4, 4, 41).double()
    z = z[z != 0]
    gate = weights.NATIVE_GATES[name](z)
    assert torch.allclose(gate * z, weights.ACTIVATIONS[name](z), atol=1e-12)
    if name != "identity":
        assert torch.allclose(gate + weights.NATIVE_GATES[name](-z), torch.ones_like(z), atol=1e-12)
