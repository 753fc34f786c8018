"""Wire stage three: open a run or a store, measure, and write the report."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache.target import check_out
from train.tensor import CPTensor, squared_norm

from . import provenance, sections, summary
from . import report as reports
from .components import describe
from .config import AnalyzeConfig
from .directions import Sources, parse, resolve, signed
from .labels import Lens, Vocabulary
from .readings import Null, Reading, arrays
from .spaces import Space, readout
from .spectra import direction_spectrum, hosvd, null_summary, null_tensor
from .subject import Subject, open_subject
from .surrogates import ladder, module_output

Progress = Callable[[str, int, int], None]
BLOCK_ROWS = 4096  # rows in float64 at a time: 128 MiB at 4,096 dimensions
HOSVD_LABELS = 12


class Summary(NamedTuple):
    """What `cli analyze` says at the end."""

    path: Path  # of report.html
    reused: bool  # it was there already


def run(config: AnalyzeConfig, on_progress: Progress | None = None) -> Summary:
    """Write the report that `config` asks for, or find it written."""
    tell = on_progress or (lambda what, done, total: None)
    parse(config.directions)  # a misspelt direction should not cost a minute
    subject = open_subject(config)
    folder = check_out(config.out or default_folder(subject))
    stamp = fingerprint(subject, config)
    if claim(folder, stamp, overwrite=config.overwrite):
        return Summary(folder / reports.PAGE, True)
    report, tensors = build(subject, config, tell)
    tell("writing", 0, 1)
    page = reports.write(folder, report, tensors, stamp)
    tell("writing", 1, 1)
    return Summary(page, False)


def default_folder(subject: Subject) -> Path:
    if subject.run:
        return subject.run.path / "report"
    return subject.store.path.parent / "report" / str(subject.layer)  # one per layer of an untouched model


def fingerprint(subject: Subject, config: AnalyzeConfig) -> dict[str, Any]:
    """What a report depends on, but for where it lies."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("path", "out", "overwrite")}
    model = None
    if subject.run:
        model = hashlib.sha256((subject.run.path / "model.safetensors").read_bytes()).hexdigest()
    return {
        "stage": "analyze",
        **options,
        "layer": subject.layer,
        "store_digest": subject.store.digest,
        "model_sha256": model,
    }


def claim(folder: Path, stamp: dict[str, Any], *, overwrite: bool) -> bool:
    """True if `folder` holds this very report. FileExistsError if it holds something that must not be lost."""
    if folder.is_file():
        raise FileExistsError(f"--out {folder} is a file: choose a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    old = json.loads((folder / reports.CONFIG).read_text()) if (folder / reports.CONFIG).is_file() else {}
    if old.get("stage") != "analyze" or not (folder / reports.PAGE).is_file():
        raise FileExistsError(f"--out {folder} holds something that is not a report: choose an empty folder")
    if old == reports.clean(stamp):
        return not overwrite
    if not overwrite:
        raise FileExistsError(
            f"{folder} holds a report of another configuration: choose another --out, or replace it with --overwrite"
        )
    return False


def build(subject: Subject, config: AnalyzeConfig, tell: Progress) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The report as one dict, and its arrays."""
    tensor, module = subject.tensor, subject.run.module if subject.run else None
    report = provenance.describe(subject, config) | {"hosvd": None, "null_terms": None, "directions": []}
    report["tensor"] = None if tensor is None else "trained" if subject.copy and subject.copy.gated else "original"
    readings, null = ([], None) if tensor is None else open_readings(subject, config, tensor, report, tell)
    tell("fitting stand-ins", 0, 1)
    steps = ladder(subject.mlp, passes(subject, config, False), passes(subject, config, True), module=module)
    tell("fitting stand-ins", 1, 1)
    report |= {"ladder": sections.ladder_section(steps), "module": module_section(subject)}
    firing = stream(subject, config, readings, tell)
    if tensor is not None:
        norm = float(squared_norm(tensor))
        report["directions"] = [reading.section(subject.store, null, norm) for reading in readings]
    report["components"] = component_section(subject, firing)
    report["history"] = sections.history_section(subject.run.history) if subject.run else None
    report["licence"], report["summary"] = summary.licence(report), summary.summary(report)
    return report, arrays(readings)


def open_readings(
    subject: Subject, config: AnalyzeConfig, tensor: CPTensor, report: dict[str, Any], tell: Progress
) -> tuple[list[Reading], Null]:
    """A reading per output direction, and the null beside them; the HOSVD section enters `report` on the way."""
    tell("output directions", 0, 3)
    sigma, left = hosvd(tensor)
    tell("output directions", 1, 3)
    null_sigma, null = nulls(subject, tensor, config.seed)
    tell("output directions", 2, 3)
    lens = make_lens(subject)
    chosen = resolve(config.directions, Sources(left, (subject.copy or subject.mlp).down.detach().double(), lens))
    readings = [Reading(d, tensor, lens, top=config.top, contexts=config.contexts) for d in chosen]
    named = [signed(left[:, s], lens) for s in range(min(HOSVD_LABELS, left.shape[1]))]
    report |= {
        "hosvd": sections.hosvd_section(sigma, null_sigma, [lens.writes(vector) for vector in named]),
        "null_terms": subject.null_terms,
    }
    tell("output directions", 3, 3)
    return readings, null


def passes(subject: Subject, config: AnalyzeConfig, held_out: bool) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    return lambda: ((x, y) for _, x, y in blocks(subject, config, held_out))


def blocks(subject: Subject, config: AnalyzeConfig, held_out: bool) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Row numbers, inputs and outputs in float64, in small blocks, up to the number of tokens asked for."""
    left = config.tokens
    for block in subject.store.blocks(subject.layer, held_out=held_out):
        for start in range(0, len(block.rows), BLOCK_ROWS):
            part = slice(start, start + min(BLOCK_ROWS, left))
            rows = block.rows[part]
            if len(rows):
                yield rows, block.x[part].double(), block.y[part].double()
            left -= len(rows)
            if left <= 0:
                return


def nulls(subject: Subject, tensor: CPTensor, seed: int) -> tuple[Tensor, Null]:
    """What random weights give: singular values, and what one direction's spectrum looks like."""
    terms = subject.null_terms
    null = null_tensor(tensor, seed, terms)
    first = torch.eye(null.down.shape[0], 1, dtype=torch.float64)[:, 0]
    values = direction_spectrum(null, first).values
    return hosvd(null)[0], Null(null_summary(tensor, seed, terms), values / values.norm())


def make_lens(subject: Subject) -> Lens:
    head = subject.store.head()
    vocabulary = Vocabulary(subject.store.tokenizer(), len(head.embedding))
    fits = head.embedding.shape[1] == subject.mlp.up.shape[1]
    return Lens(vocabulary, subject.space.embed(head.embedding) if fits else None, readout(head, subject.mlp))


@torch.no_grad()
def stream(subject: Subject, config: AnalyzeConfig, readings: list[Reading], tell: Progress) -> Tensor | None:
    """Show the held-out rows to every reading; the firing rates of the module's components, if there is one."""
    module = subject.run.module if subject.run else None
    expected = min(config.tokens, provenance.held_out_rows(subject.store))
    fired, tokens = torch.zeros((), dtype=torch.float64), 0
    for rows, x, y in blocks(subject, config, held_out=True):
        output, code = (None, None) if module is None else module_output(module, x)
        entered = subject.space.enter(x)
        for reading in readings:
            reading.update(rows, entered, y, output, code)
        if code is not None:
            fired = fired + (code != 0).double().sum(0)
        tokens += len(rows)
        tell("reading held-out tokens", tokens, expected)
    return None if module is None else fired / tokens


def module_section(subject: Subject) -> dict[str, Any] | None:
    if subject.run is None:
        return None
    pairs: dict[str, tuple[CPTensor, CPTensor]] = {}
    if subject.copy.gated and subject.mlp.gated:
        trained, original = CPTensor.of_mlp(subject.copy), CPTensor.of_mlp(subject.mlp)
        pairs[Space(None, None).name] = (trained, original)
        if subject.space.gain is not None:
            pairs[subject.space.name] = (trained.fold(subject.space.gain), original.fold(subject.space.gain))
    config = subject.run.config
    return {
        "kind": config.kind,
        "init": config.init,
        "expansion": config.expansion,
        "width": subject.copy.width,
        "gated": subject.copy.gated,
        **sections.metrics_section(subject.run.metrics),
        "similarity": sections.similarity_section(pairs),
    }


def component_section(subject: Subject, firing: Tensor | None) -> dict[str, Any] | None:
    if subject.run is None:
        return None
    parents = getattr(subject.run.module, "parents", None)
    return sections.component_section(describe(subject.copy, subject.mlp, firing, parents))
