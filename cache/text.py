"""From text to packed sequences: documents in a seeded hash order, one BOS each, concatenated and cut to the context.

The held-out units are filled by the documents that come last in that order; no sequence mixes the two sides.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from . import layout as layouts

MIN_DOCUMENT_TOKENS = 200  # blank-line-separated blocks of a plain text are merged up to this
STREAMED_TOKENS = 10_000_000  # default length of a streamed data set


@dataclass(frozen=True)
class Tokens:
    """What the model will see."""

    ids: np.ndarray  # (n_seq, context) uint32
    documents: np.ndarray  # (n_seq, context) uint64, numbered as they come in the source
    starter: str  # "bos", "eos" or "nothing": the token that begins each document
    start_id: int | None
    dropped: int  # tokens that were read and not stored: beyond --tokens, at the border, at the end
    layout: layouts.Layout

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.ids.tobytes() + self.documents.tobytes()).hexdigest()


def read_documents(text: str, field: str, split: str) -> tuple[Iterable[str], bool]:
    """The documents of a text file, a JSONL file, a saved data set or a hub data set; True if they are streamed."""
    path = Path(text)
    if path.is_dir():
        return _field(_saved(path, split), field, text), False
    if path.is_file():
        if path.suffix in (".jsonl", ".json"):
            return _field(_json_lines(path), field, text), False
        return [block.strip() for block in path.read_text(errors="replace").split("\n\n") if block.strip()], False
    if path.suffix or text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no text at {text}: give a text file, a .jsonl file, a data set folder or a hub id")
    return _field(_hub(text, split), field, text), True


def _saved(path: Path, split: str):
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a data set saved by `datasets`: give a text file or such a folder") from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"{path} has no split {split!r}; it has {sorted(saved)}: choose one with --text-split")
    return saved[split]


def _hub(name: str, split: str):
    import datasets

    try:
        return datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the hub's errors have no common class
        raise FileNotFoundError(
            f"text {name!r} is neither a file here nor a data set that the hub gave ({type(error).__name__}): "
            "check the name, or give a file"
        ) from error


def _json_lines(path: Path) -> Iterator[dict]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:  # also where the bytes are not UTF-8
                raise ValueError(f"line {number} of {path} is not JSON: {error}") from error


def _field(records: Iterable[dict], field: str, source: str) -> Iterator[str]:
    for record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{source} holds {str(record)[:40]!r} where an object with a field {field!r} should be")
        if field not in record:
            raise ValueError(f"{source} has no field {field!r}; it has {sorted(record)}: choose one with --text-field")
        if not isinstance(record[field], str | None):
            raise ValueError(f"field {field!r} of {source} holds {str(record[field])[:40]!r}, which is no text")
        if record[field] and record[field].strip():
            yield record[field]


def pack(
    documents: Iterable[str],
    tokenizer,
    *,
    merge: bool,
    context: int,
    batch: int,
    row_bytes: int,
    n_tokens: int | None,
    seed: int,
) -> Tokens:
    """Tokenise, order, split and pack. `merge` joins short blocks of a plain text into documents.

    ValueError if there is no text, or too little for a store.
    """  # fmt: skip
    starter, start_id = document_starter(tokenizer)
    encoded = _encode(documents, tokenizer, start_id, merge)
    enough = _until(encoded, 2 * n_tokens if n_tokens else None)  # twice: the order below then picks from them
    key = seed.to_bytes(8, "little", signed=True)
    order = sorted(range(len(enough)), key=lambda i: hashlib.blake2b(enough[i].tobytes(), key=key).digest())
    total = sum(map(len, enough))
    if total == 0:
        raise ValueError("the text is empty: give a text with words in it")
    layout = layouts.plan(min(total, n_tokens or total) // context, context, batch, row_bytes)
    return _cut(enough, order, layout, starter, start_id)


def document_starter(tokenizer) -> tuple[str, int | None]:
    """Which token begins each document: BOS, else EOS, else nothing."""
    for name in ("bos", "eos"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            return name, token
    return "nothing", None


def _encode(documents: Iterable[str], tokenizer, start_id: int | None, merge: bool) -> Iterator[np.ndarray]:
    start = [] if start_id is None else [start_id]
    blocks, pending = iter(documents), []
    while batch := list(islice(blocks, 256)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            pending += ids
            if not merge or len(pending) >= MIN_DOCUMENT_TOKENS:
                yield np.array(start + pending, dtype=np.uint32)
                pending = []
    if pending:
        yield np.array(start + pending, dtype=np.uint32)


def _until(encoded: Iterator[np.ndarray], n_tokens: int | None) -> list[np.ndarray]:
    kept, total = [], 0
    for ids in encoded:
        kept.append(ids)
        total += len(ids)
        if n_tokens is not None and total >= n_tokens:
            break
    return kept


def _cut(
    encoded: list[np.ndarray], order: list[int], layout: layouts.Layout, starter: str, start_id: int | None
) -> Tokens:
    """Fill the training units from the front of the order; what follows the document at the border is held out."""
    lengths = np.array([len(encoded[i]) for i in order])
    stream = np.concatenate([encoded[i] for i in order])
    names = np.repeat(np.array(order, dtype=np.uint64), lengths)
    ends = np.cumsum(lengths)
    context, wanted = layout.context, layout.n_sequences
    while True:
        border = layout.train_sequences * context
        resume = int(ends[np.searchsorted(ends, border)])  # the rest of the document at the border is dropped
        held = min(len(stream) - resume, (wanted - layout.train_sequences) * context) // context
        if held >= layouts.HELD_OUT_SHARE * (layout.train_sequences + held):
            break
        if layout.held_units + 1 >= layout.n_units:
            raise ValueError("the text is one long document: held-out rows need documents of their own, so split it")
        layout = replace(layout, held_units=layout.held_units + 1)
    used = np.r_[0:border, resume : resume + held * context]
    layout = replace(
        layout,
        n_sequences=layout.train_sequences + held,
        held_units=-(-held // layout.unit_sequences),
    )
    shape = (layout.n_sequences, context)
    return Tokens(
        stream[used].reshape(shape), names[used].reshape(shape), starter, start_id, len(stream) - len(used), layout
    )
