"""Claims about `cli train`: it learns, a killed run ends where an undisturbed one does, and strangers' files stay."""

import dataclasses
import json

import pytest
import torch

from cache.shards import DamagedStore
from train import loop
from train.config import TrainConfig
from train.folder import open_run
from train.run import run

QUICK = dict(layers="1", steps=60, batch_size=256, k=4, checkpoint_every=20, warmup=5)


def config(store, **options) -> TrainConfig:
    return TrainConfig(store=store.path, **(QUICK | options))


def contents(folder) -> dict[str, bytes]:
    metrics = json.loads((folder / "metrics.json").read_text())
    timeless = {k: v for k, v in metrics.items() if k not in ("tokens_per_second", "waiting_share")}
    names = ("model.safetensors", "history.jsonl")
    return {name: (folder / name).read_bytes() for name in names} | {"metrics": json.dumps(timeless).encode()}


@pytest.mark.parametrize("kind, init", [(k, i) for k in ("spd", "topk", "gated-topk") for i in ("expansion", "random")])
def test_every_kind_learns_and_comes_back_from_its_folder(store, kind, init):
    summary = run(config(store, kind=kind, init=init))[0]
    trained = open_run(summary.path)
    measure = "stochastic" if (kind, init) == ("spd", "random") else "fvu"
    if (kind, init) != ("spd", "expansion"):  # that one starts at nearly 0
        assert trained.history[-1][measure] < 0.8 * trained.history[0][measure]
    else:
        assert trained.history[-1]["l0"] < trained.history[0]["l0"]
    assert trained.metrics["fvu"] < 0.9 and trained.metrics["rows"] > 300
    x = next(store.blocks(1, True)).x
    again = open_run(summary.path).module
    assert torch.equal(trained.module(x).reconstruction, again(x).reconstruction)
    from train.metrics import evaluate

    assert evaluate(again, store.blocks(1, True))["fvu"] == trained.metrics["fvu"]


def test_metrics_have_what_the_reports_read(store):
    expected = {"fvu", "fvu_unmasked", "fvu_rounded", "fvu_stochastic", "fvu_adversarial", "cp_distance", "l0", "l0_0.1",
                "dead_fraction", "alive", "tokens", "steps", "tokens_per_second", "layer", "kind", "init", "expansion",
                "lr", "seed", "rows"}  # fmt: skip
    assert expected <= set(run(config(store))[0].metrics)


@pytest.mark.parametrize("kind", ["spd", "topk"])
@pytest.mark.parametrize("step", [15, 35, 45])
def test_a_stopped_run_ends_where_an_undisturbed_one_does(store, tmp_path, monkeypatch, kind, step):
    """Stopped before the first checkpoint, between two, and after the last."""
    straight = run(config(store, kind=kind, out=tmp_path / "straight"))[0].path
    real = loop.learning_rate
    calls = []

    def stop(at, options):
        calls.append(at)
        if at == step:
            raise KeyboardInterrupt
        return real(at, options)

    monkeypatch.setattr(loop, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(config(store, kind=kind, out=tmp_path / "stopped"))
    monkeypatch.setattr(loop, "learning_rate", real)
    assert (tmp_path / "stopped/checkpoints/last.pt").exists() == (step > 20) and step in calls
    resumed = run(config(store, kind=kind, out=tmp_path / "stopped"))[0].path
    assert contents(resumed) == contents(straight)
    assert not (resumed / "checkpoints").exists()


def test_the_same_command_again_changes_nothing(store):
    first = run(config(store))[0]
    before = contents(first.path)
    again = run(config(store))[0]
    assert again.reused and again.path == first.path and contents(first.path) == before


def test_a_default_spelled_out_is_the_same_run(store):
    first = run(config(store, kind="topk", steps=2))[0]
    assert run(config(store, kind="topk", steps=2, lr=first.metrics["lr"]))[0].reused


def test_only_what_decides_the_result_names_a_run(store):
    first = run(config(store, steps=4))[0].path
    same = dict(k=7, checkpoint_every=3)  # SPD has no k, and checkpoints change nothing
    assert run(config(store, steps=4, **same))[0] == (first, True, json.loads((first / "metrics.json").read_text()))
    assert run(config(store, steps=4, sparsity=2e-3))[0].path != first


def test_the_rate_falls_to_2_percent_however_short_the_run():
    for steps, warmup in ((1000, 50), (50, 50), (3, 50), (1, 0)):
        options = TrainConfig(steps=steps, warmup=warmup)
        rates = [loop.learning_rate(step, options) for step in range(steps)]
        assert rates[-1] == pytest.approx(0.02) or steps == 1
        assert max(rates) <= 1 and min(rates) > 0


def test_all_layers_are_runs_of_their_own(store):
    summaries = run(config(store, layers="all", kind="topk", steps=5))
    assert [s.metrics["layer"] for s in summaries] == [0, 1, 2]
    assert len({s.path for s in summaries}) == 3


def test_training_needs_the_store_alone(store, model_folder, monkeypatch):
    import transformers

    def forbidden(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", forbidden)
    run(config(store, steps=2))


def test_a_loss_that_is_no_number_stops_the_run(store):
    with pytest.raises(FloatingPointError, match=r"(loss|fvu) is (nan|inf) at step \d+ of .*: try a lower --lr"):
        run(config(store, kind="topk", lr=1e30, checkpoint_every=1))
    for file in store.path.parent.rglob("last.pt"):  # no broken state was kept
        state = torch.load(file, weights_only=True)["module"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def refused(invoke, *words, code=1) -> str:
    result = invoke("train", *words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def test_errors_are_one_sentence(invoke, store, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    path = store.path
    assert "layer 9 does not exist: the layers are 0-2" in refused(invoke, path, "--layers", "9")
    assert "k is 25 and at most 24 latents can fire at once" in refused(
        invoke, path, "--kind", "gated-topk", "--k", "25"
    )
    assert "k is 97 and at most 96 latents" in refused(invoke, path, "--kind", "topk", "--k", "97")
    assert "no store at" in refused(invoke, tmp_path / "nowhere")
    assert "--expansion is 0" in refused(invoke, path, "--expansion", "0", code=2)
    assert "'sae' is not one of" in refused(invoke, path, "--kind", "sae", code=2)
    assert "--batch-size is 999999 and" in refused(invoke, path, "--batch-size", "999999")
    assert "--device is 'gpu': choose auto, cpu, cuda or cuda:N" in refused(invoke, path, "--device", "gpu")
    assert "leave --out away" in refused(invoke, path, "--layers", "all", "--out", tmp_path / "o")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is 2 and this version works in one process" in refused(invoke, path)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.chdir(tmp_path / "tiny")
    assert "no complete store under ./runs: make one with `cli cache`" in refused(invoke)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_in_the_way_stays(invoke, store, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text('{"model_type": "llama"}')
    assert "holds something else: choose an empty folder" in refused(invoke, store.path, "--out", mine)
    assert (mine / "config.json").read_text() == '{"model_type": "llama"}'
    words = (store.path, "--kind", "topk", "--k", "4", "--steps", "3", "--out", tmp_path / "run")
    assert invoke("train", *words).exit_code == 0
    before = contents(tmp_path / "run")
    assert "holds a run of another configuration: choose another --out" in refused(invoke, *words, "--seed", "1")
    assert contents(tmp_path / "run") == before
    assert invoke("train", *words, "--seed", "1", "--overwrite").exit_code == 0
    assert contents(tmp_path / "run") != before


def test_a_changed_store_is_another_run(store, tmp_path):
    out = tmp_path / "run"
    run(config(store, steps=2, out=out))
    made_with = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(made_with | {"store_digest": "of the store before"}))
    with pytest.raises(FileExistsError, match="holds a run of another configuration"):
        run(config(store, steps=2, out=out))


def test_a_store_of_another_schema_or_an_incomplete_one_is_refused(invoke, store):
    (store.path / "_COMPLETE.json").rename(store.path / "kept")
    assert "is not complete: run the same `cli cache` command again" in refused(invoke, store.path)
    attributes = (store.path / "zarr.json").read_text()
    (store.path / "zarr.json").write_text(attributes.replace('"expanse_schema": 1', '"expanse_schema": 9'))
    assert "has store schema 9 and this version reads 1: cache it again" in refused(invoke, store.path)
    (store.path / "zarr.json").write_text(attributes.replace("expanse_schema", "other"))
    assert "is a Zarr group but not an Expanse store" in refused(invoke, store.path)


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "history.jsonl", "model.safetensors"])
def test_a_damaged_run_is_named(store, name):
    path = run(config(store, kind="topk", steps=2))[0].path
    (path / name).write_bytes(b"{ half")
    with pytest.raises(DamagedStore, match=f"{path}.*(restore it, or delete|train it anew with --overwrite)"):
        open_run(path)


def test_config_rejects_what_makes_no_sense():
    for field, value in (
        ("lr", 0.0),
        ("lr", float("inf")),
        ("noise", -1.0),
        ("sparsity", float("nan")),
        ("steps", 0),
        ("seed", -1),
    ):
        with pytest.raises(ValueError, match=f"--{field} is {value}"):
            dataclasses.replace(TrainConfig(), **{field: value})
