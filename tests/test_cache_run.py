"""Claims about `cli cache`: the store is what the model does, and no stop, change or stranger harms it."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr
from transformers import AutoModelForCausalLM

from cache.run import run
from cache.shards import DamagedStore
from cache.store import LEFT_OUT, Store


def digest_of(path) -> dict[str, bytes]:
    """The bytes of everything that a run writes after its metadata."""
    files = [
        f for name in ("layers", "rows", "units", "tokens", "weights") for f in (path / name).rglob("*") if f.is_file()
    ]
    return {str(f.relative_to(path)): f.read_bytes() for f in files}


def test_rows_are_what_the_model_computes(shared_store, model_folder):
    store = Store.open(shared_store)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    for block in store.blocks(1, held_out=True):
        heard = {}
        mlp = model.model.layers[1].mlp
        mlp.register_forward_hook(lambda m, a, out, heard=heard: heard.update(x=a[0], y=out))
        with torch.no_grad():
            model(torch.from_numpy(store.token_ids.astype(np.int64)))
        at = store.sequence[block.rows], store.position[block.rows]
        assert torch.allclose(heard["x"][at], block.x, atol=1e-5)
        assert torch.allclose(heard["y"][at], block.y, atol=1e-5)
        assert torch.allclose(store.mlp(1)(block.x), block.y, atol=1e-5)


def test_every_position_is_stored_once(shared_store):
    store = Store.open(shared_store)
    places = store.sequence.astype(int) * store.layout.context + store.position
    assert sorted(places) == list(range(store.layout.n_rows))
    first_batch = places[: store.layout.batch * store.layout.context]
    assert sorted(first_batch) == list(range(len(first_batch))) and (first_batch[:-1] > first_batch[1:]).any()


def test_zarr_python_reads_the_same_numbers(shared_store):
    store, group = Store.open(shared_store), zarr.open_group(shared_store, mode="r")
    for side in ("input", "output"):
        ours = torch.cat([store.read(2, side, c) for held in (False, True) for c in store.chunks(held_out=held)])
        assert np.array_equal(group[f"layers/2/{side}"][:], ours.numpy())


def test_statistics_are_those_of_the_training_rows(shared_store):
    store = Store.open(shared_store)
    blocks = list(store.blocks(0, held_out=False))
    x = torch.cat([block.x for block in blocks]).double()
    count, mean, square = store.moments(0, "input")
    assert count == len(x)
    assert torch.allclose(mean, x.mean(0), atol=1e-12) and torch.allclose(square, x.square().mean(0), atol=1e-12)
    assert ((store.flags[np.concatenate([block.rows for block in blocks])] & LEFT_OUT) == 0).all()


def test_bfloat16_is_stored_as_its_bits(cache_config, changed, tmp_path):
    path = run(changed(cache_config, out=tmp_path / "b", dtype="bfloat16")).path
    store, array = Store.open(path), zarr.open_group(path, mode="r")["layers/0/input"]
    assert array.dtype == np.uint16 and array.attrs["logical_dtype"] == "bfloat16"
    bits = torch.from_numpy(array[: store.layout.chunk_rows]).view(torch.bfloat16)
    assert torch.equal(bits, store.read(0, "input", 0))


def test_attention_sinks_are_flagged_and_left_out(cache_config, changed, tmp_path, monkeypatch):
    from cache import models

    real = models.load

    def with_sinks(*args):
        model, tokenizer = real(*args)
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda m, a: (torch.cat([20 * a[0][:, :1], a[0][:, 1:]], 1),)
        )
        return model, tokenizer

    monkeypatch.setattr(models, "load", with_sinks)
    store = Store.open(run(changed(cache_config, out=tmp_path / "s", layers="0")).path)
    sinks = store.flags & 8 > 0
    assert sinks[store.position == 0].all() and sinks[store.position > 0].mean() < 0.01
    assert all((store.position[block.rows] > 0).all() for block in store.blocks(0, held_out=False))


def test_a_second_run_changes_nothing(cache_config, shared_store):
    before = digest_of(shared_store)
    summary = run(cache_config)
    assert summary.reused and digest_of(shared_store) == before


@pytest.mark.parametrize("units", [0, 3])
def test_a_killed_run_goes_on_to_the_same_bytes(cache_config, changed, shared_store, tmp_path, units):
    """SIGKILL in the middle of unit `units`, then the same command again."""
    config = changed(cache_config, out=tmp_path / "k")
    code = f"""
import os, signal, sys
from pathlib import Path
from cache import writer
from cache.config import CacheConfig
from cache.run import run
from cache.shards import DamagedStore
real = writer.UnitWriter.append
def append(self, *args):
    real(self, *args)
    if self.unit == {units}:
        os.kill(os.getpid(), signal.SIGKILL)
writer.UnitWriter.append = append
run(CacheConfig(model={config.model!r}, text={config.text!r}, out=Path({str(config.out)!r}), context=32, batch_size=4, dtype="float32"))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ)
    path = config.out / "store.zarr"
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((path / "units").glob("*.json"))) == units and list(path.rglob("*.partial"))
    with pytest.raises(ValueError, match="is not complete: run the same `cli cache` command again"):
        Store.open(path)
    assert not run(config).reused
    assert digest_of(path) == digest_of(shared_store) and not list(path.rglob("*.partial"))
    assert (path / "_COMPLETE.json").read_bytes() == (shared_store / "_COMPLETE.json").read_bytes()


def test_values_the_dtype_cannot_hold_stop_the_run(cache_config, changed, tmp_path, monkeypatch):
    from cache import writer as module

    real = module.to_disk
    monkeypatch.setattr(module, "to_disk", lambda values, dtype: real(values * 1e6, dtype))
    with pytest.raises(
        ValueError, match=r"layer 0 input has \d+ values that float16 cannot hold: store it with --dtype"
    ):
        run(changed(cache_config, out=tmp_path / "o", dtype="float16"))
    assert not list((tmp_path / "o").rglob("*.json.partial")) and not list((tmp_path / "o").rglob("units/*.json"))


def refused(invoke, *words, code=1) -> str:
    result = invoke("cache", *words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def test_errors_are_one_sentence(invoke, model_folder, text_file, tmp_path, shared_store):
    base = (model_folder, "--text", text_file, "--context", "32", "--batch-size", "4", "--out", tmp_path / "x")
    assert "no model folder at ./nowhere: give a folder with config.json" in refused(invoke, "./nowhere", *base[1:])
    assert "no text at lost.txt: give a text file" in refused(invoke, *base, "--text", "lost.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "the text is empty: give a text with words in it" in refused(invoke, *base, "--text", tmp_path / "empty.txt")
    assert "layer 7 does not exist: the layers are 0-2" in refused(invoke, *base, "--layers", "1,7")
    assert "'x' is not a layer" in refused(invoke, *base, "--layers", "x")
    assert "'3-1' runs backwards; write 1-3" in refused(invoke, *base, "--layers", "3-1")
    assert "--seed is -1: it must be from 0" in refused(invoke, *base, "--seed", "-1", code=2)
    assert "--context is 512 and the model was made for at most 128" in refused(invoke, *base, "--context", "512")
    assert "--context is 0: it must be at least 1" in refused(invoke, *base, "--context", "0", code=2)
    assert "--out train/x lies in the source folder ./train" in refused(invoke, *base, "--out", "train/x")
    assert not (tmp_path / "x").exists()


def test_what_is_in_the_way_stays(invoke, model_folder, text_file, tmp_path, store):
    base = (model_folder, "--text", text_file, "--context", "32", "--batch-size", "4", "--dtype", "float32")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    assert "holds something else (thesis.tex): choose an empty folder" in refused(invoke, *base, "--out", mine)
    assert [f.name for f in mine.iterdir()] == ["thesis.tex"]
    assert "is a file: choose a folder" in refused(invoke, *base, "--out", mine / "thesis.tex")
    before, folder = digest_of(store.path), store.path.parent
    assert "was made with another text and another seed: choose another --out, or replace it" in refused(
        invoke, *base, "--out", folder, "--seed", "1"
    )
    assert digest_of(store.path) == before
    attributes = json.loads((store.path / "zarr.json").read_text())
    attributes["attributes"]["expanse_schema"] = 2
    attributes["attributes"]["config_sha256"] = "of another version"
    (store.path / "zarr.json").write_text(json.dumps(attributes))
    assert "has store schema 2 and this version reads 1: cache it again" in refused(invoke, *base, "--out", folder)
    assert {k: v for k, v in digest_of(store.path).items()} == before


@pytest.mark.parametrize(
    "damage, sentence",
    [
        ("rows/flags/c/0", "is missing or not whole"),
        ("units/0.json", "the unit markers of .* have changed"),
        ("layers/1/input/c/3/0", "is missing or not whole"),
        ("weights/1.safetensors", "is missing or has changed"),
    ],
)
def test_a_missing_file_is_never_read_as_zeros_and_overwrite_mends(cache_config, changed, store, damage, sentence):
    (store.path / damage).unlink()
    with pytest.raises(DamagedStore, match=sentence):
        Store.open(store.path).mlp(1)
    mended = run(changed(cache_config, out=store.path.parent, overwrite=True))
    assert not mended.reused and Store.open(mended.path).mlp(1)


def test_changed_weights_and_rows_are_noticed(store):
    for name, ask in (("weights/0.safetensors", lambda s: s.mlp(0)), ("rows/seq/c/0", lambda s: s)):
        file = store.path / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-300] + bytes([whole[-300] ^ 1]) + whole[-299:])
        with pytest.raises(DamagedStore, match="has changed|is damaged"):
            ask(Store.open(store.path))
        file.write_bytes(whole)
        ask(Store.open(store.path))


def test_a_store_can_be_read_by_colleagues(store):
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in store.path.rglob("*") if file.is_file())


def test_overwrite_replaces_a_store_and_only_a_store(invoke, model_folder, text_file, store):
    words = (model_folder, "--text", text_file, "--context", "32", "--out", store.path.parent, "--seed", "1")
    assert invoke("cache", *words, "--overwrite").exit_code == 0
    assert Store.open(store.path).attributes["seed"] == 1


def test_two_runs_do_not_write_one_store(cache_config, changed, tmp_path):
    import fcntl

    config = changed(cache_config, out=tmp_path / "two")
    config.out.mkdir()
    with open(config.out / ".store.zarr.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another run is writing .*: wait for it"):
            run(config)
