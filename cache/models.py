"""Find the MLPs of a Hugging Face decoder, read their matrices, and hear what goes in and out of them.

An MLP is recognised by the names of its projections, wherever they sit. The input is what the first projection sees,
the output what the down projection gives: before residual, dropout and post-norm, whatever module they belong to.
"""

import hashlib
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .weights import MLP, Head, Norm

# Names of (gate, up, down); gate None: ungated; gate == up: one fused matrix, gate first.
PROJECTIONS = [
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo
    ("gate_up_proj", "gate_up_proj", "down_proj"),  # Phi-3
    (None, "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Pythia, Falcon, Bloom
    (None, "c_fc", "c_proj"),  # GPT-2
    (None, "fc_in", "fc_out"),  # GPT-J
    (None, "fc1", "fc2"),  # OPT, Phi
]
ACTIVATION_NAMES = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "BloomGelu": "gelu_tanh",
}  # fmt: skip
WEIGHT_FILES = re.compile(
    r"(config|generation_config)\.json|.*\.safetensors(\.index\.json)?|tokenizer.*|.*\.model|vocab.*|merges\.txt"
)


@dataclass(frozen=True)
class Found:
    """One MLP inside a model."""

    layer: int
    name: str  # of the module that holds the projections
    first: nn.Module  # its input is the MLP's input
    down: nn.Module  # its output is the MLP's output
    mlp: MLP


def load(source: str, dtype: torch.dtype, device: str):
    """(model, tokenizer) of a local folder or a hub id, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not Path(source).is_dir() and (
        source.count("/") > 1 or source.startswith((".", "/", "~")) or Path(source).exists()
    ):
        raise FileNotFoundError(f"no model folder at {source}: give a folder with config.json, or a Hugging Face id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if AutoConfig.from_pretrained(source).is_encoder_decoder:
            raise ValueError("it is an encoder-decoder, and this reads decoders")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"model {source!r} could not be loaded as a folder or from the hub: {reason}"
        ) from error
    return model.to(device).eval(), tokenizer


def identity(source: str, model: nn.Module) -> str:
    """Hash of a local folder's config, weights and tokenizer; of a hub model the resolved revision."""
    folder = Path(source)
    if not folder.is_dir():
        return str(getattr(model.config, "_commit_hash", None))
    total = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if WEIGHT_FILES.fullmatch(f.name)):
        with open(file, "rb") as stream:
            total.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def find_mlps(model: nn.Module) -> list[Found]:
    """Every MLP of a decoder in order. ValueError names the module classes seen if there is none."""
    refuse_experts(model)
    found = []
    for name, module in model.base_model.named_modules():
        children = dict(module.named_children())
        for gate, up, down in PROJECTIONS:
            if up in children and down in children and (gate is None or gate in children):
                activation = _activation(module, model.config)
                mlp = _matrices(children, gate, up, down, activation)
                found.append(Found(len(found), name, children[gate or up], children[down], mlp))
                break
    if not found:
        classes = sorted({type(m).__name__ for m in model.modules()})
        raise ValueError(f"{type(model).__name__} has no MLP of a known form among its modules {', '.join(classes)}")
    return found


def refuse_experts(model: nn.Module) -> None:
    """ValueError for a mixture of experts: the MLP that would be found is not the whole of its layer."""
    experts = sorted({type(m).__name__ for m in model.modules() if re.search("expert|moe", type(m).__name__, re.I)})
    if experts:
        raise ValueError(f"{type(model).__name__} is a mixture of experts ({', '.join(experts)}): give a dense model")


def _activation(module: nn.Module, config) -> str:
    keys = ("hidden_activation", "hidden_act", "activation_function", "activation")
    names = [name for key in keys if isinstance(name := getattr(config, key, None), str)]
    names += [type(child).__name__ for child in module.children()]  # Bloom's config names none
    for name in names:
        if name in ACTIVATION_NAMES:
            return ACTIVATION_NAMES[name]
    raise ValueError(f"the activation of {type(module).__name__} ({names[0]}) is not one of {sorted(ACTIVATION_NAMES)}")


def _matrices(children: dict[str, nn.Module], gate: str | None, up: str, down: str, activation: str) -> MLP:
    (w_up, b_up), (w_down, b_down) = _linear(children[up]), _linear(children[down])
    if gate is None:
        return MLP(activation, w_up, w_down, None, None, b_up, b_down)
    if gate != up:
        w_gate, b_gate = _linear(children[gate])
        return MLP(activation, w_up, w_down, w_gate, b_gate, b_up, b_down)
    w_gate, w_up = w_up.chunk(2)
    b_gate, b_up = (None, None) if b_up is None else b_up.chunk(2)
    return MLP(activation, w_up, w_down, w_gate, b_gate, b_up, b_down)


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias in fp32 on the CPU; GPT-2's Conv1D keeps its weight transposed."""
    weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
    bias = getattr(module, "bias", None)
    return weight.detach().float().cpu(), None if bias is None else bias.detach().float().cpu()


class _LayersDone(Exception):
    """Raised by the last hook: the rest of the model is never computed."""


@contextmanager
def listen(found: list[Found], *, whole: bool = False):
    """Within the context, call the yielded function on ids (batch, context): {(layer, side): (batch * context, d)}.

    The forward pass stops after the last layer of `found` unless `whole`; the head is never computed.
    """
    heard: dict[tuple[int, str], Tensor] = {}

    def on_input(layer: int):
        def hook(_module, args, kwargs) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            heard[layer, "input"] = x.flatten(0, -2)

        return hook

    def on_output(layer: int, last: bool):
        def hook(_module, _args, output) -> None:
            heard[layer, "output"] = output.flatten(0, -2)
            if last:
                raise _LayersDone

        return hook

    @torch.no_grad()
    def run(model: nn.Module, ids: Tensor) -> dict[tuple[int, str], Tensor]:
        heard.clear()
        with suppress(_LayersDone):
            model.base_model(ids, use_cache=False)
        return dict(heard)

    handles = []
    for one in found:
        handles.append(one.first.register_forward_pre_hook(on_input(one.layer), with_kwargs=True))
        handles.append(one.down.register_forward_hook(on_output(one.layer, one is found[-1] and not whole)))
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _trace(model: nn.Module):
    """Within the context, note which modules read a tensor and which norm made it, by the address of its memory."""
    reads: dict[int, list[nn.Module]] = {}
    made_by: dict[int, nn.Module] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def hook(module, args, output) -> None:
        tensors = [t for t in (*args, output) if isinstance(t, Tensor)]
        alive.extend(tensors)
        for tensor in args:
            if isinstance(tensor, Tensor):
                reads.setdefault(tensor.data_ptr(), []).append(module)
        if isinstance(output, Tensor) and _is_norm(module):
            made_by[output.data_ptr()] = module

    handles = [m.register_forward_hook(hook) for m in model.modules() if _is_norm(m) or hasattr(m, "weight")]
    try:
        yield reads, made_by
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def find_norms(model: nn.Module, found: list[Found], ids: Tensor) -> dict[int, tuple[Norm | None, Norm | None]]:
    """(pre-norm, post-norm) of each MLP, found by following the tensors of one forward pass.

    The pre-norm is the norm whose output *is* the MLP's input; the post-norm the one whose input *is* its output.
    """
    with _trace(model) as (reads, made_by), listen(found, whole=True) as run:
        heard = run(model, ids)
    norms = {}
    for one in found:
        x, y = heard[one.layer, "input"].data_ptr(), heard[one.layer, "output"].data_ptr()
        own = set(model.base_model.get_submodule(one.name).children())
        shared = any(m not in own and not _is_norm(m) for m in reads[x])
        post = next((m for m in reads.get(y, []) if _is_norm(m)), None)
        pre = _read_norm(made_by[x], shared) if x in made_by else None
        norms[one.layer] = pre, None if post is None else _read_norm(post)
    return norms


@torch.no_grad()
def read_head(model: nn.Module, ids: Tensor) -> Head:
    """Embedding, unembedding and the norm whose output the unembedding reads."""
    unembed = model.get_output_embeddings()
    with _trace(model) as (reads, made_by):
        model(ids, use_cache=False)
    final = next((norm for x, norm in made_by.items() if unembed in reads.get(x, [])), None)
    weights = (m.weight.detach().float().cpu() for m in (model.get_input_embeddings(), unembed))
    return Head(*weights, None if final is None else _read_norm(final))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


@torch.no_grad()
def _read_norm(module: nn.Module, shared: bool = False) -> Norm:
    """Read a norm by using it: what it does to +v and -v, v of mean 0 and rms 1000, is gain and bias.

    So every convention (Gemma's 1 + weight among them) comes out as what really multiplies.
    """
    weight = module.weight
    d = weight.numel()
    sign = torch.ones(d, device=weight.device, dtype=weight.dtype)
    sign[1::2] = -1
    plus, minus, shifted = module(1e3 * sign), module(-1e3 * sign), module(1e3 * sign + 1e3)
    kind = "layer" if torch.allclose(plus, shifted, rtol=1e-2, atol=1e-2) else "rms"
    bias = ((plus + minus) / 2).float().cpu()
    eps = next((getattr(module, k) for k in ("variance_epsilon", "eps") if hasattr(module, k)), 0.0)
    gain = ((plus - minus) / 2 * sign).float().cpu()
    return Norm(kind, float(eps), gain, bias if bias.abs().max() > 0 else None, shared)
