"""Claims about the three commands in a row, as a new user types them."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last_path(result) -> Path:
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip().splitlines()[-1].split(": ")[-1])


def test_cache_train_analyze_in_a_row_and_once_more(invoke, in_tmp, model_folder, text_file):
    """Each later command finds what the earlier one wrote; a second time nothing is done and nothing is lost."""
    cache = ("cache", model_folder, "--text", text_file, "--context", "32", "--batch-size", "4")
    store = last_path(invoke(*cache))
    assert store == Path("runs/tiny/store.zarr")
    run = last_path(invoke("train", "--steps", "30", "--batch-size", "128"))
    assert run.parent == Path("runs/tiny").resolve() or run.parent == Path("runs/tiny")
    assert json.loads((run / "config.json").read_text())["layers"] == "1"  # the middle one of three
    report = last_path(invoke("analyze"))
    assert report.name == "report.html" and report.resolve().is_relative_to(run.resolve())
    times = {
        file: file.stat().st_mtime_ns
        for file in Path("runs").rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }
    assert last_path(invoke(*cache)) == store
    assert last_path(invoke("train", "--steps", "30", "--batch-size", "128")) == run
    assert last_path(invoke("analyze")) == report
    assert times == {file: file.stat().st_mtime_ns for file in times}


def test_analyze_reads_a_store_too(invoke, in_tmp, store):
    report = last_path(invoke("analyze", store.path, "--layer", "0"))
    assert report.is_file() and report.resolve().is_relative_to(store.path.parent.resolve())


@pytest.mark.parametrize("kind", ["topk", "gated-topk"])
def test_every_kind_can_be_analyzed(invoke, in_tmp, store, kind):
    run = last_path(invoke("train", store.path, "--kind", kind, "--k", "4", "--steps", "5", "--batch-size", "128"))
    assert last_path(invoke("analyze", run)).is_file()


def test_analyze_without_a_run_says_what_to_do(invoke, in_tmp):
    result = invoke("analyze")
    assert result.exit_code == 1 and "cli train" in result.output and "Traceback" not in result.output


def test_bare_cli_shows_help(invoke):
    result = invoke()
    assert result.exit_code == 2 and "cache" in result.output and "analyze" in result.output


def test_version(invoke):
    assert invoke("--version").stdout.strip()[0].isdigit()
