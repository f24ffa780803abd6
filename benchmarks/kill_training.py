"""Kills a tiny training with SIGKILL at random moments, lets it go on, and compares what comes out with an unkilled run.

    python benchmarks/kill_training.py --kills 200 --out kills.json

A run has two stages: all of a mixture with loss-free balancing and a balance weight that falls, then LoRA. Every step saves
a checkpoint. Half of the kills come at any moment, half within a save, at a random moment of it. After each kill, all checkpoints that are marked complete are read back
and no step that was sealed may be lost; the next process must go on from the newest. At the end of each run, every tensor
and every logged loss must be those of the unkilled run, to the last bit. Processes are forks of this one, which has all
modules loaded. Needs fork, so Linux or macOS.
"""

import argparse
import gc
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tiny_training  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.utils import logging  # noqa: E402

from unimoe.trainers import curriculum  # noqa: E402
from unimoe.trainers.recipe.recipe import Recipe, StageConfig  # noqa: E402
from unimoe.trainers.recipe.recipe_parts import LoraSettings  # noqa: E402
from unimoe.trainers.saving.checkpoints import complete_checkpoints, verify  # noqa: E402
from unimoe.trainers.saving.state_tree import load_tree  # noqa: E402
from unimoe.trainers.stages import stage  # noqa: E402
from unimoe.trainers.steps.loss_meter import LOGGED_LOSSES  # noqa: E402
from unimoe.trainers.trainer import UniMoeTrainer  # noqa: E402

PHASES = ("starting", "training", "saving a checkpoint", "saving the model of a stage", "ended")
# Longest that a process may take before it counts as hanging.
HANGING = 300.0


class Board:
    """What a process tells the one that will kill it, in memory that they share."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def clear(self) -> None:
        self.memory[:] = bytes(16)

    def enter(self, phase: str) -> None:
        self.memory[0] = PHASES.index(phase)

    @property
    def phase(self) -> str:
        return PHASES[self.memory[0]]

    def sealed(self, stage_number: int, step: int) -> None:
        """A checkpoint is complete."""
        self.memory[1], self.memory[2] = stage_number, step

    def begin_save(self, phase: str) -> None:
        self.memory[3] += 1
        self.enter(phase)

    def end_save(self, phase: str, seconds: float) -> None:
        struct.pack_into("d", self.memory, 8, self.seconds_saving + seconds)
        self.enter(phase)

    @property
    def saves(self) -> int:
        return self.memory[3]

    @property
    def seconds_saving(self) -> float:
        return struct.unpack_from("d", self.memory, 8)[0]


def recipe(start: Path, out: Path, steps: int) -> Recipe:
    common: dict[str, Any] = {"batch_size": 2, "learning_rate": 1e-2, "log_every": 4, "save_every": 1, "steps": steps}
    return Recipe(
        str(start / "model"),
        [str(start / "train.jsonl")],
        str(out),
        cache=str(start / "cache"),
        stages=[
            StageConfig(
                "all",
                train=["router", "experts", "attention", "connectors"],
                gradient_accumulation_steps=2,
                router_aux_loss_coef=0.1,
                router_aux_loss_final_coef=0.01,
                feature_noise=0.05,
                keep_checkpoints=2,
                **common,
            ),
            StageConfig("adapters", train=["router", "connectors"], lora=LoraSettings(rank=2), **common),
        ],
    )


def prepare(folder: Path) -> None:
    processor = tiny_training.processor()
    tiny_training.write_jsonl(folder, per_modality=2)
    routing = {"attention_dropout": 0.1, "router_bias_update_rate": 0.01}
    tiny_training.model(processor, sparse=True, **routing).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def train(start: Path, out: Path, steps: int, board: Board) -> None:
    """Run the recipe, or go on with it; keeps the board up to date."""
    save, save_model, build = UniMoeTrainer._save_checkpoint, curriculum._Curriculum._save_model, stage._build_trainer

    def watched_save(self: UniMoeTrainer, *args: Any) -> None:
        board.begin_save("saving a checkpoint")
        started = time.perf_counter()
        save(self, *args)
        board.sealed(["all", "adapters"].index(Path(self.args.output_dir).parent.name), self.state.global_step)
        board.end_save("training", time.perf_counter() - started)

    def watched_save_model(self: Any, folder: Path) -> None:
        board.begin_save("saving the model of a stage")
        started = time.perf_counter()
        save_model(self, folder)
        board.end_save("starting", time.perf_counter() - started)

    def watched_build(*args: Any) -> UniMoeTrainer:
        trainer = build(*args)
        trainer.add_callback(_Watch(board))
        return trainer

    UniMoeTrainer._save_checkpoint = watched_save  # type: ignore[method-assign]
    curriculum._Curriculum._save_model = watched_save_model  # type: ignore[method-assign]
    stage._build_trainer = watched_build
    curriculum.run_curriculum(recipe(start, out, steps), progress_bar=False)
    board.enter("ended")


class _Watch(TrainerCallback):
    def __init__(self, board: Board) -> None:
        self.board = board

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.board.enter("training")


def in_fork(work: Callable[[], Any]) -> int:
    """Start work in a copy of this process; its errors go to stderr."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float, until: Callable[[], bool] = lambda: False) -> int | None:
    """The exit code of a process, negative for a signal; None when it is still there after that time, or `until` holds."""
    deadline = time.perf_counter() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.perf_counter() > deadline or until():
            return None
        time.sleep(0.001)


def read_back(out: Path, steps: int, answer: Path) -> None:
    """Read all that a killed process left as complete: digests, weights, states. Writes the newest step per stage."""
    newest = {}
    for name in ("all", "adapters"):
        found = complete_checkpoints(out / name / "checkpoints")
        for checkpoint in found:
            verify(checkpoint)
            for file in checkpoint.glob("*.safetensors"):
                load_file(file)
            for tree in ("optimizer", "schedule", "process_0"):
                if not load_tree(checkpoint, tree):
                    raise SystemExit(f"{checkpoint} has an empty {tree}")
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            if checkpoint.name != f"checkpoint-{state['global_step']}":
                raise SystemExit(f"{checkpoint} is of step {state['global_step']}")
        newest[name] = int(found[-1].name.rpartition("-")[2]) if found else 0
        if (out / name / "DONE").is_file():
            newest[name] = steps + 1
    answer.write_text(json.dumps(newest))


def results(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Every tensor and every log of a finished run."""
    tensors = {
        f"{file.parent.parent.name}/{name}": tensor
        for file in sorted(out.glob("*/model/*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    logs = [json.loads(line) for name in ("all", "adapters") for line in (out / name / "losses.jsonl").open()]
    # Not how fast it went.
    return tensors, [{key: log.get(key) for key in ("step", *LOGGED_LOSSES, "grad_norm", "groups")} for log in logs]


class Killer:
    """Kills runs until there were enough kills, and the last run has ended."""

    def __init__(self, folder: Path, kills: int, steps: int, seed: int) -> None:
        self.folder, self.wanted, self.steps = folder, kills, steps
        self.random = random.Random(seed)
        self.board = Board()
        self.phases: Counter[str] = Counter()
        self.runs = 0
        self.failures: list[str] = []
        self.save_seconds = 0.0

    def __call__(self) -> dict[str, Any]:
        started = time.perf_counter()
        start = self.folder / "start"
        self._work(lambda: prepare(start))
        reference = self.folder / "reference"
        before = time.perf_counter()
        self.board.clear()
        self._work(lambda: train(start, reference, self.steps, self.board))
        duration, self.save_seconds = time.perf_counter() - before, self.board.seconds_saving / self.board.saves
        expected = results(reference)
        while sum(self.phases.values()) < self.wanted and not self.failures:
            self._run(start, self.folder / f"run-{self.runs}", duration, expected)
            self.runs += 1
        kills = sum(self.phases.values())
        return {
            "kills": kills,
            "survived": kills - len(self.failures),
            "kills_by_phase": {phase: self.phases[phase] for phase in PHASES if self.phases[phase]},
            "runs": self.runs,
            "runs_bit_equal": self.runs - len(self.failures),
            "tensors_compared_per_run": len(expected[0]),
            "seconds_of_the_unkilled_run": round(duration, 2),
            "seconds_of_a_save": round(self.save_seconds, 3),
            "seconds": round(time.perf_counter() - started, 1),
            "failures": self.failures,
        }

    def _run(self, start: Path, out: Path, duration: float, expected: Any) -> None:
        while True:
            self.board.clear()
            child = in_fork(lambda: train(start, out, self.steps, self.board))
            code = self._until_the_moment(child, duration)
            if code is None:
                os.kill(child, signal.SIGKILL)
                phase, code = self.board.phase, wait(child, HANGING)
                # It may have ended between the two.
                if code == -signal.SIGKILL and phase != "ended":
                    self.phases[phase] += 1
                    self._look(out, phase)
                    if self.failures:
                        return
                    continue
            if code:
                self.failures.append(f"{out.name} ended with {code} after {sum(self.phases.values())} kills")
                return
            break
        tensors, logs = results(out)
        different = [name for name, tensor in expected[0].items() if not torch.equal(tensor, tensors[name])]
        if different or logs != expected[1]:
            self.failures.append(f"{out.name}: {len(different)} tensors differ, e.g. {different[:3]}; logs {logs}")
            return
        shutil.rmtree(out)

    def _until_the_moment(self, child: int, duration: float) -> int | None:
        """Wait until a process shall be killed; its exit code, if it ended before."""
        if sum(self.phases.values()) >= self.wanted:
            return wait(child, HANGING)
        if self.random.random() < 0.5:
            return wait(child, self.random.uniform(0, 0.6 * duration))
        saves = self.random.randint(1, 3)
        code = wait(child, HANGING, until=lambda: self.board.saves >= saves)
        return wait(child, self.random.uniform(0, self.save_seconds)) if code is None else code

    def _look(self, out: Path, phase: str) -> None:
        """After a kill: whatever was sealed is there and can be read."""
        answer = self.folder / "newest"
        if self._work(
            lambda: read_back(out, self.steps, answer), fails=f"{out.name}, killed while {phase}: reading back failed"
        ):
            newest = json.loads(answer.read_text())
            name, step = ("all", "adapters")[self.board.memory[1]], self.board.memory[2]
            if newest[name] < step:
                self.failures.append(f"{out.name}, killed while {phase}: step {step} of {name} is lost, {newest}")

    def _work(self, work: Callable[[], Any], fails: str | None = None) -> bool:
        code = wait(in_fork(work), HANGING)
        if code == 0:
            return True
        if fails is None:
            raise SystemExit(f"The benchmark itself failed with {code}.")
        self.failures.append(fails)
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=6, help="of each of the two stages")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="where to train; by default a temporary folder")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.freeze()  # forks need not look through what is loaded
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = Killer(Path(folder), arguments.kills, arguments.steps, arguments.seed)()
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
