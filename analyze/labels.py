"""What a direction means in tokens: the vocabulary at both ends of it, and the contexts where the data goes furthest.

A read direction q enters as (q.x)^2, so its sign is free: it is chosen so that end A, the positive one, holds the
token with the largest |score|. A context is the text up to and including the token whose input was read.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BEFORE = 14  # tokens of context shown before the highlighted one
SPARE = 8  # rows kept per shown context, so that one sequence need not fill the list


class Vocabulary:
    """Token ids as text that can be seen: space as ·, newline as ⏎, tab as ⇥, other bytes as \\xNN."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.raw: list[str] = [
            token or f"<{i}>" for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(size)))
        ]
        marks = {mark: sum(token.startswith(mark) for token in self.raw) for mark in "Ġ▁"}
        self.byte_level = marks["Ġ"] > marks["▁"]
        self.shown = [self._show(token) for token in self.raw]

    def _show(self, token: str) -> str:
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
        if byte:
            return visible(bytes([int(byte[1], 16)]))
        if self.byte_level and all(character in BYTES for character in token):
            return visible(bytes(BYTES[character] for character in token))
        return visible(token.replace("▁", " ").encode())

    def find(self, text: str) -> int:
        """The id of a token given as it is stored, as it is shown, or without its leading space."""
        for candidate, names in ((text, self.raw), (visible(text.encode()), self.shown), (f"·{text}", self.shown)):
            if candidate in names:
                return names.index(candidate)
        near = difflib.get_close_matches(visible(text.encode()), sorted(set(self.shown)), n=3, cutoff=0)
        raise ValueError(f"token {text!r} is not in the vocabulary; the nearest are {', '.join(near)}")

    def join(self, ids: np.ndarray) -> str:
        """Running text: spaces as themselves."""
        return "".join(self.shown[i] for i in ids).replace("·", " ")


def visible(raw: bytes) -> str:
    """Bytes as text in which nothing is invisible; what is not UTF-8 appears as \\xNN."""
    text = raw.decode(errors="backslashreplace")
    text = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes printable Latin-1 bytes as themselves and the others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTES = _byte_alphabet()


@dataclass(frozen=True)
class Ends:
    """Token ids and scores at the positive (a) and negative (b) end of a direction, strongest first."""

    a: list[tuple[int, float]]
    b: list[tuple[int, float]]
    flip: bool  # the direction's sign had to change for `a` to hold the larger extreme


def both_ends(rows: Tensor, direction: Tensor, count: int = 6) -> Ends:
    """Vocabulary rows (vocabulary, d) furthest along a direction (d,), either way, by their dot product."""
    scores = (rows @ direction.to(rows.dtype)).double()
    flip = bool(-scores.min() > scores.max())
    scores = -scores if flip else scores
    count = min(count, len(scores))
    ends = [scores.topk(count, largest=largest) for largest in (True, False)]
    a, b = (list(zip(end.indices.tolist(), end.values.tolist(), strict=True)) for end in ends)
    return Ends(a, b, flip)


@dataclass(frozen=True)
class Lens:
    """Turns vectors into tokens. `embedding` and `readout` are None where the head's width is not the MLP's."""

    vocabulary: Vocabulary
    embedding: Tensor | None  # (vocabulary, d_in), in the coordinates of the report
    readout: Tensor | None  # (vocabulary, d_out)

    def reads(self, vector: Tensor) -> tuple[Tensor, dict[str, list[dict[str, Any]]] | None]:
        """A read direction (d_in,) with its free sign chosen, and the tokens at its ends."""
        if self.embedding is None:
            return vector * vector[vector.abs().argmax()].sign(), None
        ends = both_ends(self.embedding, vector)
        return (-vector if ends.flip else vector), {"a": self._name(ends.a), "b": self._name(ends.b)}

    def writes(self, vector: Tensor) -> dict[str, list[dict[str, Any]]] | None:
        """Tokens that an output direction (d_out,) as it stands raises (a) and lowers (b)."""
        if self.readout is None:
            return None
        ends = both_ends(self.readout, vector)
        if not ends.flip:
            return {"a": self._name(ends.a), "b": self._name(ends.b)}
        return {"a": self._name(ends.b, -1), "b": self._name(ends.a, -1)}

    def _name(self, end: list[tuple[int, float]], sign: int = 1) -> list[dict[str, Any]]:
        return [{"token": self.vocabulary.shown[i], "score": sign * score} for i, score in end]


class TopContexts:
    """Keeps, for each direction, the rows of the data furthest along it either way, and its mean square."""

    def __init__(self, directions: Tensor, count: int) -> None:
        self.directions, self.count = directions, count  # (d, k)
        self.values = directions.new_zeros(0, directions.shape[1])  # (kept, k)
        self.rows = torch.zeros(0, directions.shape[1], dtype=torch.long)
        self.tokens, self.squares = 0, directions.new_zeros(directions.shape[1])

    def update(self, rows: np.ndarray, x: Tensor) -> None:
        """Add inputs x (n, d) of the store's rows (n,)."""
        projections = x @ self.directions  # (n, k)
        self.tokens += len(x)
        self.squares += projections.square().sum(0)
        values = torch.cat([self.values, projections])
        numbers = torch.cat([self.rows, torch.from_numpy(rows.astype(np.int64))[:, None].expand_as(projections)])
        kept = values.abs().topk(min(len(values), self.count * SPARE), dim=0).indices
        self.values, self.rows = values.gather(0, kept), numbers.gather(0, kept)

    @property
    def mean_square(self) -> Tensor:
        """E[(q.x)^2] (k,)."""
        return self.squares / max(1, self.tokens)

    def best(self, k: int, sequence: np.ndarray) -> list[tuple[int, float]]:
        """Row and q.x of the furthest rows along direction k, at most one per sequence."""
        chosen: dict[int, tuple[int, float]] = {}
        for row, value in zip(self.rows[:, k].tolist(), self.values[:, k].tolist(), strict=True):
            chosen.setdefault(int(sequence[row]), (row, value))
        return list(chosen.values())[: self.count]


def context(store: Any, vocabulary: Vocabulary, row: int) -> dict[str, Any]:
    """The text before a row's token, and that token."""
    sequence, position = int(store.sequence[row]), int(store.position[row])
    ids = store.token_ids[sequence, max(0, position - BEFORE) : position + 1]
    return {
        "before": ("…" if position > BEFORE else "") + vocabulary.join(ids[:-1]),
        "token": vocabulary.shown[ids[-1]],
        "sequence": sequence,
        "position": position,
    }
