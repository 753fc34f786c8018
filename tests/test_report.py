"""The report of a small invented store and run: what it holds, what it shows, and the sentences of its errors."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from analyze import run as analysis
from analyze.config import AnalyzeConfig
from analyze.directions import parse
from analyze.labels import Vocabulary
from analyze.report import clean, number
from analyze.spaces import choose_space, readout
from analyze.subject import Subject, check_weights, newest_run, open_subject
from analyze.summary import licence
from cache.weights import MLP, Head, Norm
from invented import TOKENS, D, M, Tokenizer, make_mlp
from train.config import TrainConfig
from train.folder import Run
from train.init import expand, latents_of_neurons
from train.modules import GatedTopK, TopK

CONTEXT, SEQUENCES = 16, 12


class Store:
    """What `analyze` reads of a store, in memory: Gaussian inputs and the outputs of `mlp`."""

    def __init__(self, mlp: MLP, path: Path) -> None:
        generator, rows = torch.Generator().manual_seed(0), SEQUENCES * CONTEXT
        self.path, self.layers, self.digest, self._mlp = path / "store.zarr", [3], "d1", mlp
        self.attributes = {"source": "/home/someone/tiny-llama", "model": "abc", "text": "stories", "dtype": "float16"}
        self.sequence, self.position = np.divmod(np.arange(rows), CONTEXT)
        self.flags = np.where(self.position == 0, 1, 0) | np.where(self.sequence >= 8, 16, 0)
        self.token_ids = torch.randint(len(TOKENS), (SEQUENCES, CONTEXT), generator=generator).numpy()
        self.x = torch.randn(rows, D, generator=generator) * mlp.pre_norm.gain
        self.y = mlp(self.x)

    def blocks(self, layer, held_out):
        kept = ((self.flags & 15) == 0) & (((self.flags & 16) != 0) == held_out)
        for rows in np.array_split(np.flatnonzero(kept), 3):
            yield SimpleNamespace(rows=rows, x=self.x[rows], y=self.y[rows])

    def head(self):
        generator = torch.Generator().manual_seed(1)
        embedding, unembedding = (torch.randn(len(TOKENS), D, generator=generator) for _ in range(2))
        return Head(embedding, unembedding, Norm("rms", 1e-5, torch.linspace(0.5, 1.5, D)))

    def tokenizer(self):
        return Tokenizer()


def make_subject(tmp_path: Path, kind: str = "gated-topk", *, gated: bool = True) -> Subject:
    mlp = make_mlp(gated=gated)
    store = Store(mlp, tmp_path)
    if kind == "store":
        return Subject(store, 3, mlp, None, None, choose_space(mlp))
    parents = torch.arange(M).repeat_interleave(2)
    generator = torch.Generator().manual_seed(2)
    if kind == "gated-topk":
        wide = expand(mlp, 2, noise=0.3, divide=False, generator=generator)
        module = GatedTopK(wide, k=3, family=2, parents=parents).eval()
    else:
        rows = latents_of_neurons(mlp, 2, noise=0.3, generator=generator)
        means = {"input_mean": torch.zeros(D), "output_mean": store.y.mean(0)}
        module = TopK(*rows, k=3, parents=parents, **means).eval()
    path = tmp_path / f"3-{kind}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")
    metrics = {
        "fvu": 0.25,
        "l0": 3.0,
        "dead_fraction": 0.0,
        "kind": kind,
        "lr": 0.01,
        "steps": 40,
        "broken": float("nan"),
    }
    history = [{"step": s, "loss": 1 / (s + 1), "fvu": 0.5 + 0.1 * s, "lr": 0.01, "odd": None} for s in range(4)]
    config = TrainConfig(store=store.path, layers="3", kind=kind, expansion=2, k=3)
    return Subject(store, 3, mlp, Run(path, config, module, metrics, history), module.as_mlp(), choose_space(mlp))


OPTIONS = {"directions": "hosvd:1,token:cat,component:4", "top": 2, "contexts": 3}


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """A finished report of every sort of subject."""
    made = {}
    for name, kind, gated in [
        ("store", "store", True), ("gated", "gated-topk", True), ("topk", "topk", True), ("ungated", "topk", False),
    ]:  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        subject = make_subject(folder, kind, gated=gated)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(analysis, "open_subject", lambda config, subject=subject: subject)
            page = analysis.run(AnalyzeConfig(**OPTIONS)).path
        data = json.loads((page.parent / "report.json").read_text(), parse_constant=pytest.fail)
        made[name] = SimpleNamespace(page=page, html=page.read_text(), data=data, subject=subject)
    return made


class Page(HTMLParser):
    """Checks that tags close in order, and collects tables, ids and everything a browser could fetch."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.ids, self.fetched, self.tables, self.row, self.cell = [], [], [], {}, None, None
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.fetched += [
            v for k, v in attributes.items() if k in ("src", "href", "xlink:href", "srcset", "action", "data")
        ]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(attributes.get("id", f"table {len(self.tables)}"), [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


KINDS = ("store", "gated", "topk", "ungated")


@pytest.mark.parametrize("kind", KINDS)
def test_page_parses_and_fetches_nothing(reports, kind):
    html = reports[kind].html
    page = Page(html)
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.fetched)
    assert all(name.strip("'\"#") in page.ids for name in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html and "<script" not in html
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)


@pytest.mark.parametrize("kind", KINDS)
def test_report_is_complete_and_its_json_has_no_nan(reports, kind):
    folder = reports[kind].page.parent
    assert {p.name for p in folder.iterdir()} == {
        "report.html", "report.md", "report.json", "config.json", "arrays.safetensors", "figures"
    }  # fmt: skip
    text = (folder / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]  # no temporary folder is left
    for figure in re.findall(r"\((figures/[^)]*)\)", (folder / "report.md").read_text()):
        assert (folder / figure).is_file() and (folder / figure).with_suffix(".png").is_file()


def test_table_cells_are_the_numbers_of_the_json(reports):
    data, tables = reports["gated"].data, Page(reports["gated"].html).tables
    ladder = [[rung["name"], number(rung["r2"]), rung["meaning"]] for rung in data["ladder"]["rungs"]]
    assert tables["table-ladder"][1:] == ladder
    energy = [number(data["ladder"]["energy"][name]) for name in ("even", "odd", "cross")]
    assert tables["table-energy"][1][1:] == energy
    metrics, meanings = data["module"]["metrics"], data["module"]["meanings"]
    assert tables["table-metrics"][1:] == [[name, number(v), meanings[name] or ""] for name, v in metrics.items()]
    assert ["broken", "–", ""] in tables["table-metrics"]
    names = ["cosine", "functional_cosine", "relative_distance", "scale", "distance_at_best_scale"]
    similarity = [[number(row[name]) for row in data["module"]["similarity"]] for name in names]
    assert [row[1:] for row in tables["table-similarity"][1:]] == similarity
    columns = data["components"]["columns"]
    shown = [[str(c)] + [number(column[c]) for column in columns.values()] for c in data["components"]["shown"]]
    assert tables["table-components"][1:] == shown
    for i, direction in enumerate(data["directions"]):
        ranks = tables[[name for name in tables if name.startswith("table ")][i]]
        assert ranks[1][1:] == [
            number(direction["ranks"][n]) for n in ("absolute", "participation", "stable", "pairs90")
        ]


def test_arrays_are_the_spectra_of_the_json(reports):
    arrays = load_file(reports["gated"].page.parent / "arrays.safetensors")
    for i, direction in enumerate(reports["gated"].data["directions"]):
        values, vectors = arrays[f"directions/{i}/values"], arrays[f"directions/{i}/vectors"]
        torch.testing.assert_close(values, torch.tensor(direction["values"], dtype=torch.float64))
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(D, dtype=torch.float64))
        torch.testing.assert_close(arrays[f"directions/{i}/vector"].norm(), torch.tensor(1.0, dtype=torch.float64))


def test_directions_are_the_ones_asked_for(reports):
    names = [direction["name"] for direction in reports["gated"].data["directions"]]
    assert names == ["HOSVD 1", "token ·cat", "component 4"]
    curves = [set(direction["truncation"]) for direction in reports["gated"].data["directions"]]
    assert curves[2] - curves[0] == {"stored output, component active"}
    store = reports["store"]
    row = readout(store.subject.store.head(), store.subject.mlp)[2].double()
    vector = load_file(store.page.parent / "arrays.safetensors")["directions/1/vector"]
    torch.testing.assert_close(vector, row / row.norm())


def test_contexts_are_the_furthest_rows(reports):
    subject, data = reports["store"].subject, reports["store"].data
    vectors = load_file(reports["store"].page.parent / "arrays.safetensors")["directions/0/vectors"]
    rows = np.concatenate([block.rows for block in subject.store.blocks(3, True)])
    pair = data["directions"][0]["pairs"][0]
    projections = (subject.store.x[rows].double() / subject.mlp.pre_norm.gain) @ vectors[:, pair["index"]]
    best = int(rows[projections.abs().argmax()])
    first = pair["contexts"][0]
    assert first["row"] == best and first["activation"] == pytest.approx(pair["value"] * projections.abs().max() ** 2)
    sequence, position = divmod(best, CONTEXT)
    assert (first["sequence"], first["position"]) == (sequence, position)
    assert first["token"] == Vocabulary(Tokenizer(), len(TOKENS)).shown[subject.store.token_ids[sequence, position]]
    assert len({c["sequence"] for c in pair["contexts"]}) == len(pair["contexts"]) == 3
    assert pair["mean_activation"] == pytest.approx(pair["value"] * float(projections.square().mean()))


def test_a_module_without_gates_says_so_and_reads_the_original(reports):
    text = re.sub(r"<[^>]*>", "", reports["topk"].html)
    assert "This module has no quadratic form" in text and "about the original MLP" in text
    assert reports["topk"].data["tensor"] == "original" and reports["topk"].data["directions"]
    assert [r["name"] for r in reports["topk"].data["ladder"]["rungs"]][-1] == "module"
    ungated = reports["ungated"].data
    assert ungated["tensor"] is None and ungated["directions"] == [] and ungated["hosvd"] is None
    assert "Neither this MLP nor the module has a quadratic form" in reports["ungated"].html


def test_page_names_no_local_folder(reports):
    assert "/home/someone" not in reports["store"].html + json.dumps(reports["store"].data)
    assert reports["store"].data["model"] == "tiny-llama"


def test_null_counts_copies_of_a_neuron_once(reports):
    assert reports["gated"].data["null_terms"] == M and reports["gated"].data["components"]["count"] == 2 * M


def run_on(monkeypatch, subject: Subject, **options) -> Path:
    monkeypatch.setattr(analysis, "open_subject", lambda config: subject)
    return analysis.run(AnalyzeConfig(**{**OPTIONS, "directions": "hosvd:1", **options})).path


def test_same_report_is_not_made_twice(monkeypatch, tmp_path):
    subject = make_subject(tmp_path, "store")
    page = run_on(monkeypatch, subject)
    before = page.stat().st_mtime_ns
    monkeypatch.setattr(analysis, "build", lambda *rest: pytest.fail("built again"))
    again = analysis.run(AnalyzeConfig(**{**OPTIONS, "directions": "hosvd:1"}))
    assert again == (page, True) and page.stat().st_mtime_ns == before


def test_another_configuration_needs_overwrite(monkeypatch, tmp_path):
    subject = make_subject(tmp_path, "store")
    page = run_on(monkeypatch, subject)
    before = page.read_bytes()
    with pytest.raises(FileExistsError, match="holds a report of another configuration: choose another --out, or"):
        run_on(monkeypatch, subject, seed=5)
    assert page.read_bytes() == before
    run_on(monkeypatch, subject, seed=5, overwrite=True)
    assert json.loads((page.parent / "config.json").read_text())["seed"] == 5


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_report_is_left_alone(monkeypatch, tmp_path, overwrite):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis holds something that is not a report: choose an empty folder"):
        run_on(monkeypatch, make_subject(tmp_path, "store"), out=out, overwrite=overwrite)
    assert [p.name for p in out.iterdir()] == ["chapter.txt"]
    with pytest.raises(FileExistsError, match="chapter.txt is a file: choose a folder"):
        run_on(monkeypatch, make_subject(tmp_path, "store"), out=out / "chapter.txt", overwrite=overwrite)


def test_a_failed_report_leaves_nothing(monkeypatch, tmp_path):
    subject = make_subject(tmp_path, "store")
    monkeypatch.setattr("analyze.report.draw", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_on(monkeypatch, subject)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("directions", "sentence"),
    [
        ("token:ca", "token 'ca' is not in the vocabulary; the nearest are ·cat"),
        ("component:12", "component:12 is out of range: there are 12, give component:0 to component:11"),
        ("hosvd:9", "hosvd:9 is out of range: the output has 8 directions, give hosvd:1 to hosvd:8"),
        ("latent:3", "direction 'latent:3' is not hosvd:N, token:STRING or component:N"),
        ("component:x", "direction 'component:x': 'x' is not a number, give component:0 or more"),
    ],
)
def test_wrong_directions_end_in_one_sentence(monkeypatch, tmp_path, directions, sentence):
    subject = make_subject(tmp_path)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run_on(monkeypatch, subject, directions=directions)
    assert not (subject.run.path / "report").exists()


def test_wrong_options_and_paths_end_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="--top is 0: it must be at least 1"):
        AnalyzeConfig(top=0)
    with pytest.raises(ValueError, match="--directions is empty: give for example hosvd:4"):
        AnalyzeConfig(directions=" ")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give a run folder or a store"):
        open_subject(AnalyzeConfig(path=tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no finished run under .*: make one with `cli train`"):
        newest_run(tmp_path)
    broken = dataclasses.replace(make_mlp(), up=torch.full((M, D), torch.nan))
    with pytest.raises(ValueError, match="up of layer 3 holds NaN or infinity"):
        check_weights(broken, "layer 3")


def test_commas_may_stand_in_tokens():
    assert parse("hosvd:2,token:a,b,component:3") == [("hosvd", "2"), ("token", "a,b"), ("component", "3")]
    assert parse("token:,") == [("token", ",")]


def test_licence_follows_the_ladder():
    def text(activation="silu", biases=False, **r2):
        rungs = [{"name": name.replace("_", "-"), "r2": value} for name, value in r2.items()]
        mlp = {"activation": activation, "input_biases": biases}
        return " ".join(licence({"tensor": "original", "mlp": mlp, "ladder": {"rungs": rungs}}))

    assert "is no model of it on real tokens: R² of ‘half’ is −2.200" in text(half=-2.2, mean_gate=0.6)
    assert "a partial account" in text(half=0.3, mean_gate=0.6)
    assert "speak for most of the layer" in text(half=0.3, mean_gate=0.9)
    assert "do not read its eigenvectors as the layer's features" in text(half=0.3, mean_gate=0.2)
    assert "not exactly the even part" in text(biases=True, half=0.3, mean_gate=0.9)


def test_numbers_read_alike_everywhere():
    shown = {0.5: "0.500", -1.234: "−1.23", 12.34: "12.3", 1234.5: "1,234", 0: "0", 7: "7", None: "–"}
    shown |= {0.0123: "0.0123", 0.00123: "0.00123", 1e-5: "1.00e−05", 1234567: "1,234,567", 2.5e7: "2.50e+07"}
    assert {value: number(value) for value in shown} == shown
    assert number(0.0) == "0"
    assert clean({"a": float("nan"), "b": (1, float("inf")), "c": Path("x")}) == {"a": None, "b": [1, None], "c": "x"}
