"""What `cli cache` can be told. One field is one option: its annotation is the help text, its default the default."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal


@dataclass(frozen=True)
class CacheConfig:
    model: Annotated[
        str | None, "Folder or Hugging Face id of a causal language model (default: the small one that ships)"
    ] = None
    text: Annotated[
        str | None, "Text file, .jsonl file, `datasets` folder or Hugging Face data set (default: the text that ships)"
    ] = None
    out: Annotated[Path | None, "Folder for the store (default: runs/<name of the model>)"] = None
    layers: Annotated[str, "Layers to store: 'all', or a list such as 0,2,5-7"] = "all"
    tokens: Annotated[int | None, "Tokens to store (default: all of a local text, 10M of a streamed one)"] = None
    context: Annotated[int, "Tokens per sequence"] = 256
    batch_size: Annotated[int, "Sequences per forward pass"] = 16
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"],
        "Storage dtype; auto: the compute dtype if 16-bit, else float16",
    ] = "auto"
    compute_dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"], "Dtype of the model; auto: float32 on CPU, bfloat16 on GPU"
    ] = "auto"
    device: Annotated[str, "auto, cpu, cuda or cuda:N"] = "auto"
    text_field: Annotated[str, "Field that holds the text, for .jsonl files and data sets", "advanced"] = "text"
    text_split: Annotated[str, "Split of a data set", "advanced"] = "train"
    seed: Annotated[int, "Seed of the document order and of the row order"] = 0
    overwrite: Annotated[bool, "Delete the store that is in the way, whatever its configuration, and begin anew"] = (
        False
    )

    def __post_init__(self) -> None:
        if self.context > 65536:
            raise ValueError(f"--context is {self.context}: positions are stored in 16 bits, so at most 65536")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}: it must be from 0 to {2**32 - 1}")
        for name in ("context", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1")
        if self.tokens is not None and self.tokens < self.context:
            raise ValueError(f"--tokens is {self.tokens}, less than one sequence of --context {self.context}")


def parse_layers(text: str, available: list[int]) -> list[int]:
    """'all' or '0,2,5-7' as a sorted list; ValueError names a layer that is not among `available`."""
    if text.strip() == "all":
        return list(available)
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)):
            raise ValueError(
                f"--layers {text!r}: {part.strip()!r} is not a layer; write 'all' or a list such as 0,2,5-7"
            )
        if int(last if dash else first) < int(first):
            raise ValueError(f"--layers {text!r}: {part.strip()!r} runs backwards; write {last}-{first}")
        chosen.update(range(int(first), int(last if dash else first) + 1))
    for layer in sorted(chosen - set(available)):
        raise ValueError(f"layer {layer} does not exist: the layers are {spell(available)}")
    return sorted(chosen)


def spell(layers: list[int]) -> str:
    """[0, 1, 2, 5] as '0-2, 5'."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
