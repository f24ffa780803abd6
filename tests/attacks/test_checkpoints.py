"""Checkpoints against damage, full disks, second writers and pickles."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_bench import ONLY_TEXT, Bench

from unimoe.errors import CheckpointError
from unimoe.trainers.recipe.recipe_parts import LoraSettings
from unimoe.trainers.saving import resumable
from unimoe.trainers.saving.checkpoints import COMPLETE_FILE, SAVING_FOLDER, newest_checkpoint, seal, verify
from unimoe.trainers.saving.folder_lock import exclusive
from unimoe.trainers.saving.state_tree import load_tree, save_tree
from unimoe.trainers.stages.stage_files import clear_work, mark_done, verify_results, written_aside
from unimoe.trainers.steps.lora import add_lora
from unimoe.trainers.steps.trainable import set_trainable
from unimoe.trainers.trainer import UniMoeTrainer

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def trainer(bench: Bench, folder: Path, steps: int = 2, lora: bool = False, **options: Any) -> UniMoeTrainer:
    model = bench.model()
    set_trainable(model, ["router"])
    made = add_lora(model, LoraSettings(rank=2)) if lora else model
    options = {"save_strategy": "steps", "save_steps": 1, "modality_weights": ONLY_TEXT, **options}
    return bench.trainer(folder, made, steps, **options)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "lora"])
def saved(request: Any, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """A run with two checkpoints, which tests copy."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(bench, folder, lora=request.param).train()
    return folder, request.param


def test_every_missing_or_altered_file_is_refused_by_name(saved: tuple[Path, bool], tmp_path: Path) -> None:
    source = saved[0] / "checkpoint-2"
    names = [*json.loads((source / COMPLETE_FILE).read_text())]
    assert {"optimizer.safetensors", "process_0.json", "trainer_state.json"} <= set(names)
    for number, name in enumerate(names):
        for damage in ("missing", "altered"):
            folder = tmp_path / f"{number}-{damage}"
            copy = shutil.copytree(source, folder / source.name)
            if damage == "missing":
                (copy / name).unlink()
            else:
                content = bytearray((copy / name).read_bytes())
                content[len(content) // 2] ^= 1
                (copy / name).write_bytes(content)
            with pytest.raises(CheckpointError) as raised:
                newest_checkpoint(folder)
            assert str(raised.value).startswith(f"{name} of the checkpoint {copy} ")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a.bin": 3}', '{"../a": [1, "x"]}'])
def test_a_damaged_manifest_is_refused(saved: tuple[Path, bool], tmp_path: Path, content: str) -> None:
    copy = shutil.copytree(saved[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    (copy / COMPLETE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=COMPLETE_FILE if content else "was not written with it"):
        verify(copy)


def test_files_that_were_put_there_are_refused(saved: tuple[Path, bool], tmp_path: Path) -> None:
    copy = shutil.copytree(saved[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    (copy / ".nfs0001").write_bytes(b"")  # left by network disks
    verify(copy)
    (copy / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin of the checkpoint .* was not written with it"):
        verify(copy)


def test_a_checkpoint_that_is_named_is_looked_at_too(saved: tuple[Path, bool], bench: Bench, tmp_path: Path) -> None:
    folder, lora = saved
    copy = shutil.copytree(folder / "checkpoint-1", tmp_path / "checkpoint-1")
    (copy / COMPLETE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-1 is incomplete: it has no file COMPLETE"):
        trainer(bench, tmp_path, lora=lora).train(resume_from_checkpoint=str(copy))


def test_weights_alone_are_no_checkpoint_to_go_on_from(bench: Bench, tmp_path: Path) -> None:
    """Stock trainers go on with a fresh optimizer, in silence."""
    trainer(bench, tmp_path, save_only_model=True).train()
    with pytest.raises(CheckpointError, match=r"'optimizer' cannot be read from .* holds weights only"):
        trainer(bench, tmp_path, steps=3).train(resume_from_checkpoint=True)


def test_nothing_is_pickled_or_unpickled(
    saved: tuple[Path, bool], bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lora = saved
    suffixes = {path.suffix for path in (folder / "checkpoint-2").rglob("*") if path.is_file()} - {"", ".md"}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".py", ".txt"}, suffixes
    shutil.copytree(folder / "checkpoint-1", tmp_path / "checkpoint-1")
    made = trainer(bench, tmp_path, lora=lora)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was unpickled")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, forbidden)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 2


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    tree = {
        "numbers": [1, -2.5, float("inf"), True, None, "text"],
        "nested": ({"a": (1, 2)}, []),
        1: torch.arange(3, dtype=torch.uint8),
        "1": torch.tensor(0.1),
    }
    save_tree(tree, tmp_path, "state")
    loaded = load_tree(tmp_path, "state")
    assert loaded["numbers"] == tree["numbers"]
    assert loaded["nested"] == tree["nested"]
    assert torch.equal(loaded[1], tree[1])
    assert torch.equal(loaded["1"], tree["1"])
    with pytest.raises(CheckpointError, match=r"state\.x is a object, which cannot be saved without pickling"):
        save_tree({"x": object()}, tmp_path, "state")
    (tmp_path / "state.json").write_text('{"tensor": "not there"}')
    with pytest.raises(CheckpointError, match="'state' cannot be read"):
        load_tree(tmp_path, "state")


# --- writes that fail --------------------------------------------------------------------------------------------------


def in_fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def untouched(folder: Path) -> None:
    """The old checkpoint is whole, and nothing of the new one is left."""
    assert newest_checkpoint(folder).name == "checkpoint-1"
    assert not list(folder.glob(f"{SAVING_FOLDER}/*/*"))
    assert not (folder / "checkpoint-2").exists()


@needs_fork
@pytest.mark.parametrize("of", ["model", "optimizer"])
def test_a_full_disk_leaves_the_old_checkpoint(bench: Bench, tmp_path: Path, of: str) -> None:
    """Files may not grow beyond a limit, as where the disk is full; the kernel refuses within the write."""
    made = trainer(bench, tmp_path, save_strategy="steps", save_steps=1)
    size = {"model": 100_000, "optimizer": 1_000}[of]
    writes = {"model": "_save", "optimizer": "_save_optimizer_and_scheduler"}[of]
    write = getattr(made, writes)

    def limited(*args: Any) -> None:
        if made.state.global_step == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    setattr(made, writes, limited)

    def work() -> None:
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written in .*untouched"):
            made.train()

    assert in_fork(work) == 0
    untouched(tmp_path)
    again = trainer(bench, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_errors_of_the_system_are_told(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    made = trainer(bench, tmp_path)
    save = resumable.save_tree

    def fails(tree: Any, folder: Path, name: str) -> None:
        if made.state.global_step == 2 and name == "process_0":
            raise OSError(code, os.strerror(code))
        save(tree, folder, name)

    monkeypatch.setattr(resumable, "save_tree", fails)
    with pytest.raises(CheckpointError, match=rf"checkpoint-2 could not be written .*{os.strerror(code)}.*make room"):
        made.train()
    untouched(tmp_path)


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"The folder for checkpoints could not be made in .*file/below"):
        trainer(bench, tmp_path / "file" / "below")
    made = trainer(bench, tmp_path / "folder")
    monkeypatch.setattr(os, "open", _refuse)
    with pytest.raises(CheckpointError, match=r"\.lock could not be written in .*folder: .*Read-only"):
        made.train()
    assert made.state.global_step == 0


def test_leftovers_of_a_killed_save_do_not_get_into_the_next(bench: Bench, tmp_path: Path) -> None:
    leftover = tmp_path / SAVING_FOLDER / "checkpoint-1" / "adapter_model.safetensors"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    trainer(bench, tmp_path, steps=1).train()
    assert not (tmp_path / "checkpoint-1" / leftover.name).exists()


def test_a_complete_checkpoint_of_the_same_step_is_unmarked_before_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while it is deleted must leave an incomplete one, not one that claims to be whole."""

    def write() -> None:
        folder = tmp_path / SAVING_FOLDER / "checkpoint-3"
        folder.mkdir(parents=True)
        (folder / "a").write_text("a")
        seal(folder, tmp_path / "checkpoint-3")

    write()
    marked: list[bool] = []
    delete = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, *a, **k: (marked.append((path / COMPLETE_FILE).exists()), delete(path, *a, **k))
    )
    write()
    assert marked == [False]
    verify(tmp_path / "checkpoint-3")


def test_files_are_flushed_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / SAVING_FOLDER / "checkpoint-1"
    (written / "below").mkdir(parents=True)
    for name in ("a", "below/b"):
        (written / name).write_text(name)
    expected = {str(path) for path in (written, *written.rglob("*"))}
    order: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, other: (order.append("rename"), rename(self, other))[1])
    seal(written, tmp_path / "checkpoint-1")
    assert set(order[: order.index("rename")]) == expected
    after = order[order.index("rename") + 1 :]
    assert after[0] == str(tmp_path)
    assert after[-1] == str(tmp_path / "checkpoint-1")


# --- two writers -------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(bench: Bench, tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(CheckpointError, match=rf"process {os.getpid()} on .*is training in"):
        trainer(bench, tmp_path).train()
    trainer(bench, tmp_path, steps=1).train()


@needs_fork
def test_the_lock_dies_with_its_process_although_its_workers_live(tmp_path: Path) -> None:
    """Workers of data loaders are forks, which hold what was open in their parent, and notice its death late."""
    read_end, write_end = os.pipe()
    holder = os.fork()
    if holder == 0:
        with exclusive(tmp_path):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
            os.write(write_end, str(worker).encode())
            time.sleep(60)
    worker = int(os.read(read_end, 20))
    try:
        with pytest.raises(CheckpointError), exclusive(tmp_path):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(worker, 0)  # is there
        with exclusive(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


# --- between stages ----------------------------------------------------------------------------------------------------


def test_what_a_stage_left_is_looked_at_before_it_is_used(tmp_path: Path) -> None:
    with written_aside(tmp_path / "model") as written:
        written.mkdir()
        (written / "model.safetensors").write_bytes(b"weights")
        (written / "README.md").write_text("card")
    mark_done(tmp_path)
    (tmp_path / "model" / "README.md").write_text("edited")
    verify_results(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"WEIGHTS")
    with pytest.raises(CheckpointError, match=r"model/model\.safetensors of the finished stage .* other content"):
        verify_results(tmp_path)


def test_a_kill_while_a_done_stage_is_cleared_leaves_no_half_checkpoint_and_the_next_start_clears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        written = tmp_path / "checkpoints" / SAVING_FOLDER / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "a").write_text("a")
        seal(written, tmp_path / "checkpoints" / written.name)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mark_done(tmp_path)
    assert (tmp_path / "DONE").is_file()
    assert len(list((tmp_path / "checkpoints").glob("*/a"))) == 2
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    clear_work(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_stage_whose_model_cannot_be_written_keeps_the_one_before(tmp_path: Path) -> None:
    def write(text: str, code: int = 0) -> None:
        with written_aside(tmp_path / "model") as written:
            written.mkdir()
            (written / "a").write_text(text)
            if code:
                raise OSError(code, os.strerror(code))

    write("old")
    with pytest.raises(CheckpointError, match=r"model could not be written .* No space left"):
        write("new", errno.ENOSPC)
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
