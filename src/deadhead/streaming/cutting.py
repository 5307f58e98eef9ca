"""Cut a checkpoint on disk: shard by shard if possible, otherwise in memory."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import GenerationConfig

from deadhead.checkpoints import checkpoint
from deadhead.cutting import cut, warn_of_cache
from deadhead.data import has_tokenizer, load_tokenizer
from deadhead.disk.checksums import sha256_of, write_checksums
from deadhead.disk.files import no_space_is_input_error, remove_left_overs, replaced_folder, write_json, write_text
from deadhead.disk.places import checked_path
from deadhead.disk.reading import read_json
from deadhead.disk.stored import INDEX_FILE, WEIGHTS_FILE, weights_size
from deadhead.errors import CutError, InputError, typed
from deadhead.layouts.stock import why_not_stock
from deadhead.measure.cost import model_cost
from deadhead.measure.costs import Cost
from deadhead.modes import free_memory
from deadhead.plans.plan import HeadPlan
from deadhead.streaming.copying import copy_pieces, send_to_disk
from deadhead.streaming.layer_check import NotStreamable
from deadhead.streaming.prepare import StreamedCut, prepare
from deadhead.streaming.stored_model import open_stored

MANIFEST_FILE = "cut.json"
_LOCK_FILE = "lock"
_VERSION = 1
# A single file of at least this many bytes is cut without being loaded.
STREAMED_FROM = 2 << 30
# While one file waits for the disk or is hashed, another is read.
_FILES_AT_ONCE = 2
# Bytes for the manifest, the tokenizer and similar files, which need room besides the weights.
_ROOM = 1 << 20

Progress = Callable[[str, int, int], None]
"""Called with the current work, how much is done and how much in total: bytes of "copying", layers of "checking"."""


@dataclass(frozen=True, kw_only=True)
class CheckpointCut:
    """The result of cutting a checkpoint.

    Args:
        before: cost of the model before the cut.
        after: cost of the cut model.
        streamed: whether the checkpoint was cut shard by shard.
        why_in_memory: why a large checkpoint was not cut shard by shard; None otherwise.
        why_not_stock: why the cut model has modelling code of its own; None if it is one of transformers' own.
        read_bytes: bytes of the source's tensors.
        written_bytes: bytes of the new checkpoint's tensors.
    """

    before: Cost
    after: Cost
    streamed: bool
    why_in_memory: str | None = None
    why_not_stock: str | None = None
    read_bytes: int = 0
    written_bytes: int = 0


@typed
def cut_checkpoint(
    source: str | Path,
    plan: HeadPlan,
    out: str | Path,
    *,
    stream: bool | None = None,
    resume: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> CheckpointCut:
    """Write the checkpoint that `load`, `cut` and `save` would write, with at most one layer of the model in memory.

    Tensors are copied from file to file, each into a file of the same name. Meanwhile each layer that loses units is
    checked on random hidden states: closed gates against the cut. Files are hashed as they are written; a resumed cut
    reads the files of the stopped one again and compares their hashes. Until the cut is complete, the files are in
    `OUT.work` beside `out`.

    Args:
        source: a checkpoint folder; or a GGUF file, or a name on the Hugging Face hub, which is cut in memory.
        plan: the heads and hidden units that stay.
        out: the new folder; if it holds a checkpoint that deadhead wrote, that is replaced as a whole.
        stream: whether to cut shard by shard; None: if the checkpoint has several shards, or one of 2 GiB or more, and
            can be cut that way.
        resume: continue a stopped cut from `OUT.work`.
        device: device of a cut in memory; None: the CPU.
        dtype: dtype of the weights, such as "bfloat16", for a cut in memory; None: the one they were saved in.
        progress: see `Progress`; called from several threads.

    Raises:
        InputError: the checkpoint is damaged, cannot be cut that way, or not within this memory; the plan does not fit
            it; `out` cannot be written; `resume` is set but there is nothing to resume, or there is a stopped cut but
            `resume` is not set.
        UnsupportedModel: the model has no prunable heads.
        CutError: the cut model computes something else; nothing was left behind.

    Warns:
        RunWarning: as `cut` does.
    """
    folder, out = checked_path(source), checked_path(out)
    if out.resolve() == folder.resolve():
        raise InputError(
            f"The cut model must not overwrite the model it is made from, {source}; choose another out (--out)."
        )
    checkpoint.require_ours_or_free(out)
    why: str | None = None
    if device is not None or dtype is not None:
        if stream:
            raise InputError(
                "device and dtype are for a cut in memory, but stream was asked for too; leave out one of the two."
            )
        stream = False
    if stream or (stream is None and _is_large(folder)):
        try:
            return _streamed(folder, plan, out, resume=resume, progress=progress or (lambda *_: None))
        except NotStreamable as error:
            why = str(error)
        if stream:
            raise InputError(f"{source} cannot be cut shard by shard, because {why}; cut it in memory.")
    if resume:
        raise InputError(
            "There is nothing to resume, because a stopped cut in memory leaves nothing; leave resume (--resume) out."
        )
    needed, free = weights_size(folder), free_memory(torch.device("cpu"))
    if needed > free:
        reason = f" (it cannot be cut shard by shard, because {why})" if why else ""
        raise InputError(
            f"Cutting {source} in memory takes {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; use a machine "
            f"with more memory{reason}."
        )
    network = checkpoint.load(source, device=device, dtype=dtype)
    before = model_cost(network, unit=plan.unit)
    cut(network, plan)
    checkpoint.save(network, out, tokenizer=_tokenizer(folder), base=source)
    return CheckpointCut(
        before=before,
        after=model_cost(network),
        streamed=False,
        why_in_memory=why,
        why_not_stock=why_not_stock(network),
    )


def _is_large(folder: Path) -> bool:
    is_single = (folder / WEIGHTS_FILE).is_file()
    return (folder / INDEX_FILE).is_file() or (is_single and weights_size(folder) >= STREAMED_FROM)


def _tokenizer(source: Path) -> Any:
    return load_tokenizer(source) if has_tokenizer(source) else None


def _streamed(source: Path, plan: HeadPlan, out: Path, *, resume: bool, progress: Progress) -> CheckpointCut:
    out = out.resolve()
    work = out.with_name(out.name + ".work")
    checkpoint.require_no_model(work, source)
    if work.exists() and not resume:
        raise InputError(f"{work} is left from a stopped cut; continue it with resume (--resume), or delete it.")
    if resume and not work.is_dir():
        raise InputError(f"There is nothing to resume: {work}, where a stopped cut leaves its files, does not exist.")
    planned = prepare(open_stored(source), plan)
    # One layer is checked before anything is written: whether layers of this kind can be.
    planned.check_one()
    return write_cut(planned, source, out, work, tokenizer=_tokenizer(source), resume=resume, progress=progress)


def write_cut(
    planned: StreamedCut, source: Path, out: Path, work: Path, *, tokenizer: Any, resume: bool, progress: Progress
) -> CheckpointCut:
    """Write a cut of which one layer was checked, or continue a stopped one from `work`."""
    if planned.cache_growth:
        warn_of_cache(planned.cache_growth, stacklevel=6)
    with no_space_is_input_error(out), _work_folder(work, planned, source) as manifest:
        if resume:
            remove_left_overs(out.parent, out.name)
        _require_room(out, planned, manifest)
        _copy_and_check(planned, manifest, progress)
        _publish(planned, manifest, source, tokenizer, out)
    shutil.rmtree(work, ignore_errors=True)
    return CheckpointCut(
        before=planned.before,
        after=planned.after,
        streamed=True,
        why_not_stock=why_not_stock(planned.model),
        read_bytes=planned.stored.nbytes,
        written_bytes=planned.written_bytes,
    )


class _Manifest:
    """The manifest of a work folder: its cut, and the finished files with their hashes."""

    def __init__(self, work: Path, identity: dict[str, Any]) -> None:
        self.work, self.identity = work, identity
        self.finished: dict[str, str] = {}
        self._lock = threading.Lock()

    def begin(self, names: Collection[str]) -> None:
        """Read or write the manifest; remove files that it does not list or that changed since they were finished."""
        path = self.work / MANIFEST_FILE
        if not path.exists():
            self._write()
        values = read_json(path, what="list of what a stopped cut has done")
        finished = values.pop("finished", None) if isinstance(values, dict) else None
        if not isinstance(finished, dict) or values != self.identity:
            raise InputError(
                f"{self.work} is left from a cut by another plan, or of a model that was changed since; resume with "
                "those, or delete it."
            )
        for entry in self.work.iterdir():
            name = entry.name
            if name in names and entry.is_file() and sha256_of(entry) == finished.get(name):
                self.finished[name] = finished[name]
            elif name not in (MANIFEST_FILE, _LOCK_FILE):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def finish(self, name: str, digest: str, part: Path) -> None:
        send_to_disk(part)
        with self._lock:
            os.replace(part, self.work / name)
            self.finished[name] = digest
            self._write()

    def _write(self) -> None:
        write_json(self.work / MANIFEST_FILE, {**self.identity, "finished": dict(sorted(self.finished.items()))})


@contextmanager
def _work_folder(work: Path, planned: StreamedCut, source: Path) -> Iterator[_Manifest]:
    """Yield the manifest of a work folder; remove the folder if it holds nothing to resume or the cut is wrong."""
    work.mkdir(parents=True, exist_ok=True)
    manifest = _Manifest(work, _identity(planned, source))
    try:
        lock = FileLock(work / _LOCK_FILE).acquire(timeout=0)
    except (OSError, NotImplementedError):
        raise InputError(f"Another process is cutting into {work}; let it finish, or stop it.") from None
    with lock:
        fresh = not (work / MANIFEST_FILE).exists()
        try:
            manifest.begin(planned.pieces)
            yield manifest
        except BaseException as error:
            if isinstance(error, (CutError, NotStreamable)) or (fresh and not manifest.finished):
                shutil.rmtree(work, ignore_errors=True)
            raise


def _identity(planned: StreamedCut, source: Path) -> dict[str, Any]:
    stats = {name: (source / name).stat() for name in (*planned.stored.files, "config.json")}
    return {
        "version": _VERSION,
        "plan": planned.plan.to_dict(),
        "fitted": sorted(p.source.name for pieces in planned.pieces.values() for p in pieces if p.fitted),
        "source": {name: {"size": found.st_size, "mtime_ns": found.st_mtime_ns} for name, found in stats.items()},
    }


def _require_room(out: Path, planned: StreamedCut, manifest: _Manifest) -> None:
    pieces = [piece for name, found in planned.pieces.items() if name not in manifest.finished for piece in found]
    needed = _ROOM + sum(piece.nbytes for piece in pieces)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InputError(
            f"The device has too little space for {out}: it needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are "
            "free; free some and try again."
        )


def _copy_and_check(planned: StreamedCut, manifest: _Manifest, progress: Progress) -> None:
    """Copy files in separate threads, and check layers in this one."""
    stored, layers = planned.stored, sorted(planned.check.sites)
    stop, lock, done = threading.Event(), threading.Lock(), 0

    def copied(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress("copying", done, stored.nbytes)

    def copy(name: str) -> None:
        pieces = () if name in manifest.finished else planned.pieces.get(name, ())
        copied(sum(tensor.nbytes for tensor in stored.files[name]) - sum(piece.source.nbytes for piece in pieces))
        if not pieces or stop.is_set():
            return
        part = manifest.work / f"{name}.part"
        try:
            digest = copy_pieces(stored.folder / name, part, pieces, progress=copied, stop=stop)
        except OSError:
            part.unlink(missing_ok=True)  # the space it takes may be what is missing
            raise
        manifest.finish(name, digest, part)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        copies = [pool.submit(copy, name) for name in stored.files]
        try:
            for count, place in enumerate(layers):
                if any(started.done() and started.exception() for started in copies):
                    break
                if count:
                    planned.check.check(place)
                progress("checking", count + 1, len(layers))
            for finished in as_completed(copies):
                finished.result()
        except BaseException:
            stop.set()
            raise


def _publish(planned: StreamedCut, manifest: _Manifest, source: Path, tokenizer: Any, out: Path) -> None:
    """Move the files, and the other files of a checkpoint, to `out`."""
    model: Any = planned.model
    # What emptied modules return was seen when their layers were checked.
    emptied: list[Any] = [module for module in planned.check.model.modules() if hasattr(module, "num_outputs")]
    if emptied:
        model.config.attention_outputs = int(emptied[0].num_outputs)
    if _identity(planned, source)["source"] != manifest.identity["source"]:
        raise InputError(f"The weights in {source} were changed during the cut; cut them again.")
    if model.can_generate() and (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source), local_files_only=True)
    with replaced_folder(out) as folder:
        model.save_pretrained(folder, state_dict={})
        for left in folder.glob("*.safetensors"):
            left.unlink()
        checkpoint.save_beside(model, folder, tokenizer, source)
        for name in planned.pieces:
            try:
                os.link(manifest.work / name, folder / name)
            except OSError:
                # A file system without hard links; a kill before the end then costs the work that was done.
                os.replace(manifest.work / name, folder / name)
        if (source / INDEX_FILE).is_file():
            weight_map = {piece.source.name: name for name, pieces in planned.pieces.items() for piece in pieces}
            metadata = {"total_parameters": model.num_parameters(), "total_size": planned.written_bytes}
            index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
            write_text(folder / INDEX_FILE, index + "\n")
        write_checksums(folder, manifest.finished)
