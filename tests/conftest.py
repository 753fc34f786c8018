"""Small real things for the tests: a random Llama with the shipped tokenizer, a text, a store, and a command runner."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cache.config import CacheConfig
from cache.run import ASSETS
from cache.run import run as run_cache
from cache.store import Store
from cache.weights import MLP

torch.set_num_threads(1)  # matrices are tiny; two threads only wait for each other


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A random SwiGLU Llama: d=16, m=24, 3 layers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=1024, max_position_embeddings=128, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 12,000 tokens in some 16 chapters."""
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text("\n\n".join((ASSETS / "text.txt").read_text().split("\n\n")[:16]))
    return file


@pytest.fixture(scope="session")
def cache_config(model_folder, text_file, tmp_path_factory) -> CacheConfig:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return CacheConfig(model=str(model_folder), text=str(text_file), out=out, context=32, batch_size=4, dtype="float32")


@pytest.fixture(scope="session")
def shared_store(cache_config) -> Path:
    """Read it, never write into it."""
    return run_cache(cache_config).path


@pytest.fixture
def store(shared_store, tmp_path) -> Store:
    """A store of one's own."""
    shutil.copytree(shared_store, tmp_path / "tiny" / "store.zarr")
    return Store.open(tmp_path / "tiny")


@pytest.fixture
def mlp() -> MLP:
    """A random SwiGLU MLP without biases, float64: d=6, m=5."""
    generator = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(*s, generator=generator).double() for s in ((5, 6), (5, 6), (6, 5)))
    return MLP("silu", up, down, gate)


@pytest.fixture
def invoke():
    """Run a command line: `invoke("train", "--k", "3")` gives typer's result, standard error in `.stderr`."""
    from cli import app

    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def changed():
    """`changed(config, seed=1)`: the same config with other values."""
    return dataclasses.replace
