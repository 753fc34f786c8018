"""May this run write here? Everything that stands between a store and a file that it must not touch."""

import fcntl
import shutil
from contextlib import contextmanager
from pathlib import Path

from . import store

SOURCE_FOLDERS = {"cache", "train", "analyze"}  # a run written there would mix with the package's own files

DECIDES = {"model": "model", "tokens": "text", "layers": "choice of layers", "dtype": "dtype", "seed": "seed",
           "compute_dtype": "compute dtype", "device_kind": "kind of device"}  # fmt: skip


def check_out(out: Path) -> Path:
    """Refuse a folder of the source tree: outputs belong under runs/."""
    inside = out.resolve().relative_to(Path.cwd()).parts[:1] if out.resolve().is_relative_to(Path.cwd()) else ()
    if set(inside) & SOURCE_FOLDERS:
        raise ValueError(
            f"--out {out} lies in the source folder ./{inside[0]}: choose a folder such as runs/{out.name}"
        )
    return out


def check_target(path: Path) -> None:
    """The output folder may be absent, empty, or a run folder; anything else is somebody's and stays."""
    folder = path.parent
    if folder.is_file():
        raise FileExistsError(f"--out {folder} is a file: choose a folder")
    if path.exists() and not (path / "zarr.json").is_file():
        raise FileExistsError(f"{path} exists and is not a store: choose another --out")
    foreign = [p.name for p in sorted(folder.iterdir()) if not _ours(p)] if folder.is_dir() else []
    if foreign and not path.exists():
        raise FileExistsError(f"--out {folder} holds something else ({foreign[0]}): choose an empty folder")


def _ours(entry: Path) -> bool:
    """Run folders, reports and our own hidden or unfinished files may stand beside a store."""
    return entry.name.startswith((".", store.NAME)) or entry.name == "report" or (entry / "config.json").is_file()


def discard(path: Path) -> None:
    """Delete a folder of ours: it loses its name first, so that a kill leaves no half of it under that name."""
    trash = path.with_name(f".{path.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash)


def existing(path: Path, attributes: dict, overwrite: bool) -> bool:
    """True if `path` holds this very store, begun or finished, to be kept. FileExistsError if it holds another."""
    if not (path / "zarr.json").is_file():
        return False
    old = store.read_json(path / "zarr.json").get("attributes", {})
    if overwrite and "expanse_schema" in old:
        discard(path)
        return False
    if old.get("config_sha256") == attributes["config_sha256"]:
        return True
    store.read_attributes(path)
    changed = [word for key, word in DECIDES.items() if old[key] != attributes[key]]
    raise FileExistsError(
        f"{path} was made with another {' and another '.join(changed or ['layout'])}: "
        "choose another --out, or replace it with --overwrite"
    )


@contextmanager
def only_writer(path: Path):
    """One writing run at a time; the lock is the kernel's, so a killed run leaves none."""
    with open(path.parent / f".{store.NAME}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another run is writing {path}: wait for it, or choose another --out") from error
        yield
