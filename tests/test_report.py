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
from analyze.components import describe, sibling_cosine, term_cosine
from analyze.config import AnalyzeConfig
from analyze.directions import parse
from analyze.labels import Ends, TopContexts, Vocabulary, both_ends
from analyze.report import clean, number
from analyze.spaces import Space, choose_space, readout
from analyze.subject import Subject, check_weights, newest_run, open_subject
from analyze.summary import licence
from cache.weights import MLP, Head, Norm
from train.config import TrainConfig
from train.folder import Run
from train.init import expand, latents_of_neurons
from train.modules import GatedTopK, TopK

D, M, CONTEXT, SEQUENCES = 8, 6, 16, 12
TOKENS = ["<s>", "▁the", "▁cat", "▁sat", "ing", "<0x0A>", "|", "<b>", "▁dog", "s", "▁a", "▁mat"]


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [TOKENS[i] for i in ids]


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


def make_mlp(*, gated: bool = True, seed: int = 0) -> MLP:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator) / shape[-1] ** 0.5  # noqa: E731
    norm = Norm("rms", 1e-5, torch.linspace(0.5, 2, D))
    gate = draw(M, D) if gated else None
    return MLP("silu" if gated else "relu", draw(M, D), draw(D, M), gate, pre_norm=norm)


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


def test_tokens_are_shown_visibly_and_found_again():
    pieces = Vocabulary(Tokenizer(), len(TOKENS))
    assert pieces.shown[:6] == ["<s>", "·the", "·cat", "·sat", "ing", "⏎"]
    assert [pieces.find(text) for text in ("▁cat", "·cat", "cat", " cat", "\n")] == [2, 2, 2, 2, 5]
    assert pieces.join(np.array([1, 2, 4])) == " the cating"


def test_byte_level_tokens_are_shown_as_their_text():
    from tokenizers.pre_tokenizers import ByteLevel

    def stored(text: str) -> str:
        return "".join(part for part, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))

    texts = [" the", "é", "\n\n", "\tx", "日", "\x00", "\x7f", "\xad", "a b"]
    raw = [*map(stored, texts), "Ġcat", "Ã"]
    vocabulary = Vocabulary(SimpleNamespace(convert_ids_to_tokens=lambda ids: [raw[i] for i in ids]), len(raw))
    assert vocabulary.shown[:5] == ["·the", "é", "⏎⏎", "⇥x", "日"]
    assert vocabulary.shown[5:] == ["\\x00", "\\x7f", "\\xad", "a·b", "·cat", "\\xc3"]


def test_end_a_holds_the_larger_extreme():
    rows = torch.tensor([[1.0, 0], [-3, 0], [0, 1]])
    ends = both_ends(rows, torch.tensor([1.0, 0]), 2)
    assert ends == Ends(a=[(1, 3.0), (2, 0.0)], b=[(0, -1.0), (2, 0.0)], flip=True)


def test_top_contexts_do_not_depend_on_blocks():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, sequence = np.arange(60) + 100, np.arange(200) // 5
    whole, parts = (TopContexts(torch.eye(4, dtype=torch.float64), 3) for _ in range(2))
    whole.update(rows, x)
    for part in (slice(0, 1), slice(1, 35), slice(35, 60)):
        parts.update(rows[part], x[part])
    for k in range(4):
        assert whole.best(k, sequence) == parts.best(k, sequence)
        assert whole.best(k, sequence)[0] == (100 + int(x[:, k].abs().argmax()), float(x[x[:, k].abs().argmax(), k]))


def test_token_scores_do_not_depend_on_the_coordinates():
    norm = Norm("rms", 1e-5, torch.linspace(0.5, 2, D))
    embedding, read = torch.randn(5, D), torch.randn(D)
    plain, folded = Space(None, norm), Space(norm.gain.double(), norm)
    scores = plain.embed(embedding) @ read  # q.x, x the normed embedding
    torch.testing.assert_close(folded.embed(embedding) @ (norm.gain * read), scores)
    torch.testing.assert_close(plain.embed(embedding), torch.nn.functional.rms_norm(embedding, (D,), norm.gain, 0.0))
    layer = Norm("layer", 1e-5, norm.gain, torch.ones(D))
    expected = torch.nn.functional.layer_norm(embedding, (D,), layer.gain, layer.bias, 0.0)
    torch.testing.assert_close(Space(None, layer).embed(embedding), expected)
    assert choose_space(dataclasses.replace(make_mlp(), pre_norm=layer)).gain is None


def test_readout_is_the_change_of_logits_up_to_a_constant():
    head = Head(torch.zeros(7, D), torch.randn(7, D), Norm("layer", 0.0, torch.rand(D), torch.rand(D)))
    stream, write = torch.randn(2, D, dtype=torch.float64).unbind()
    step = 1e-6

    def logits(residual):
        centred = residual - residual.mean()
        return head.unembedding.double() @ (centred / stream.std(correction=0) * head.final_norm.gain)

    change = (logits(stream + step * write) - logits(stream)) / step * stream.std(correction=0)
    rows = readout(head, make_mlp()).double()
    torch.testing.assert_close(rows @ write, change - change.mean(), atol=1e-5, rtol=1e-5)
    assert readout(dataclasses.replace(head, unembedding=torch.randn(7, D + 1)), make_mlp()) is None


def test_cosine_of_terms_is_that_of_their_dense_tensors():
    a, b = (make_mlp(seed=s).map(torch.Tensor.double) for s in (0, 1))

    def dense(mlp, i):
        raw = torch.einsum("o,a,b->oab", mlp.down[:, i], mlp.gate[i], mlp.up[i])
        return ((raw + raw.transpose(1, 2)) / 2).flatten()

    i, j = torch.tensor([0, 2, 5]), torch.tensor([1, 2, 0])
    expected = [torch.cosine_similarity(dense(a, x), dense(b, y), 0) for x, y in zip(i, j, strict=True)]
    torch.testing.assert_close(term_cosine(a, i, b, j), torch.stack(expected))


def test_fresh_copies_have_cosine_one_to_parent_and_siblings():
    mlp, parents, generator = make_mlp(), torch.arange(M).repeat_interleave(2), torch.Generator()
    wide = expand(mlp, 2, noise=0.0, divide=True, generator=generator)
    columns = describe(wide, mlp, torch.zeros(2 * M), parents)
    ones = torch.ones(2 * M, dtype=torch.float64)
    torch.testing.assert_close(columns.cos_parent, ones)
    torch.testing.assert_close(columns.cos_sibling, ones)
    encoder, decoder = latents_of_neurons(mlp, 4, noise=0.0, generator=generator)
    latents = MLP("relu", encoder, decoder.T)
    four = torch.arange(M).repeat_interleave(4)
    torch.testing.assert_close(
        describe(latents, mlp, torch.zeros(4 * M), four).cos_parent, ones.repeat(2), atol=1e-6, rtol=0
    )


def test_nearest_sibling_is_looked_for_in_the_family_alone():
    mlp = make_mlp().map(torch.Tensor.double)
    parents = torch.tensor([0, 1, 0, 2, 0, 1])
    found = sibling_cosine(mlp, parents)
    every = torch.tensor(
        [[float(term_cosine(mlp, torch.tensor([i]), mlp, torch.tensor([j]))) for j in range(M)] for i in range(M)]
    )
    for c in range(M):
        family = [j for j in range(M) if j != c and parents[j] == parents[c]]
        assert found[c].isnan() if not family else found[c] == pytest.approx(float(every[c, family].max()))


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
