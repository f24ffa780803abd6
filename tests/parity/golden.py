"""Golden data: tensors that the original implementations wrote, and a record of which of them the tests compared.

A case is a folder with `io.safetensors`. Cases are found by what they hold, never by name, size or seed:

    @pytest.mark.golden("beats.fbank*", weights="*.patch_embedding.weight")
    def test_beats(golden_case):
        features = model(golden_case.input("beats.fbank0"))
        golden_case.check("beats.features0", features)

Environment:
    UNIMOE_GOLDEN          the folder of cases; default: ../shared/golden next to the repository
    CI=true                a folder that is missing, or holds no case of the system that a test is about, fails the test
                           instead of skipping it
    UNIMOE_GOLDEN_REPORT   "summary" (default: names the first tensors of every file that no test compared), "list" (names
                           all of them) or "strict" (like "list", and the run fails when a tensor was neither compared
                           nor read as an input)
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT_VARIABLE = "UNIMOE_GOLDEN"
REPORT_VARIABLE = "UNIMOE_GOLDEN_REPORT"
RELATIVE_TOLERANCE = 1e-5
Scale = Literal["rms", "largest"]
# Weights are parameters, not results: no test compares them one by one.
_WEIGHT_FILES = ("weights", "merged_weights")
# Results that are texts and numbers, by kind: lists of entries, or entries by name.
CASES_FILE = "cases.json"
# The systems whose tests found a case when they were collected.
SYSTEMS_FOUND: set[str] = set()


class GoldenMismatchError(AssertionError):
    """A result differs from the golden tensor."""


def golden_root() -> Path:
    """The folder of golden cases, which need not exist."""
    repository = Path(__file__).resolve().parents[2]
    return Path(os.environ.get(ROOT_VARIABLE) or repository.parent / "shared" / "golden")


def running_in_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"


def report_level() -> str:
    level = os.environ.get(REPORT_VARIABLE) or "summary"
    if level not in ("summary", "list", "strict"):
        raise ValueError(f"{REPORT_VARIABLE} is {level!r}; use summary, list or strict.")
    return level


@dataclass
class Ledger:
    """Which golden tensors the tests compared and which they read as inputs, per "case/file"."""

    compared: dict[str, set[str]] = field(default_factory=dict)
    read: dict[str, set[str]] = field(default_factory=dict)

    def merge(self, other: Mapping[str, Mapping[str, Iterable[str]]]) -> None:
        for kind in ("compared", "read"):
            for source, names in other.get(kind, {}).items():
                getattr(self, kind).setdefault(source, set()).update(names)

    def as_plain(self) -> dict[str, dict[str, list[str]]]:
        """Lists in place of sets, for the wire between pytest-xdist processes."""
        return {
            kind: {source: sorted(names) for source, names in getattr(self, kind).items()}
            for kind in ("compared", "read")
        }


LEDGER = Ledger()


class GoldenCase:
    """One folder of golden data. Tensors load on demand; `check` compares and records, `input` records a read.

    Args:
        path: the folder.
        ledger: where to record; None records nothing (copies with planted errors).
    """

    def __init__(self, path: Path, ledger: Ledger | None = LEDGER) -> None:
        self.path = path
        self.comparisons = 0
        self._ledger = ledger

    def __repr__(self) -> str:
        return f"GoldenCase({self.name})"

    @property
    def name(self) -> str:
        root = golden_root()
        return self.path.relative_to(root).as_posix() if self.path.is_relative_to(root) else self.path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`; empty when the case has none."""
        return self.json("config") if (self.path / "config.json").is_file() else {}

    def json(self, file: str) -> Any:
        return json.loads((self.path / f"{file}.json").read_text(encoding="utf-8"))

    def json_or_empty(self, file: str) -> dict[str, Any]:
        """An object in a JSON file that some cases lack."""
        data = self.json(file) if (self.path / f"{file}.json").is_file() else {}
        return data if isinstance(data, dict) else {}

    def fields(self, name: str) -> dict[str, Any]:
        """What `cases.json` says of a batch; empty when it says nothing."""
        found = self.json_or_empty("cases").get(name)
        return found if isinstance(found, dict) else {}

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "weights.safetensors")

    def weights_under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The weights whose name starts with `prefix`, without it."""
        return {name[len(prefix) :]: value for name, value in self.weights.items() if name.startswith(prefix)}

    def names(self, pattern: str = "*", file: str = "io") -> list[str]:
        return sorted(name for name in tensor_names(self.path / f"{file}.safetensors") if fnmatchcase(name, pattern))

    def has(self, *names: str, file: str = "io") -> bool:
        return set(names) <= tensor_names(self.path / f"{file}.safetensors")

    def input(self, name: str, file: str = "io") -> torch.Tensor:
        """A golden tensor that the code under test takes as an input."""
        self._record("read", file, name)
        return self._load(name, file)

    def check(
        self,
        name: str,
        actual: torch.Tensor,
        rtol: float = RELATIVE_TOLERANCE,
        file: str = "io",
        scale: Scale = "rms",
    ) -> None:
        """Compares `actual` with a golden tensor; see `compare`.

        Raises:
            GoldenMismatchError: they differ.
        """
        expected = self._load(name, file)
        try:
            compare(actual.detach(), expected, rtol, scale)
        except GoldenMismatchError as error:
            raise GoldenMismatchError(f"{self.name}/{file}: {name}: {error}") from None
        self.comparisons += 1
        self._record("compared", file, name)

    def check_if_present(self, name: str, actual: torch.Tensor, **options: Any) -> bool:
        """`check` for a tensor that some cases lack; says whether it was there."""
        if not self.has(name, file=options.get("file", "io")):
            return False
        self.check(name, actual, **options)
        return True

    def _load(self, name: str, file: str) -> torch.Tensor:
        with safe_open(self.path / f"{file}.safetensors", "pt") as handle:
            return handle.get_tensor(name)

    def _record(self, kind: str, file: str, name: str) -> None:
        if self._ledger is not None:
            getattr(self._ledger, kind).setdefault(f"{self.name}/{file}", set()).add(name)


def compare(
    actual: torch.Tensor, expected: torch.Tensor, rtol: float = RELATIVE_TOLERANCE, scale: Scale = "rms"
) -> None:
    """Requires equal shapes and, for floats, |actual - expected| <= rtol * (|expected| + rms(expected)) everywhere.

    The second term is the scale of the tensor: sums that cancel to nearly zero carry its rounding errors. Where the
    golden tensor itself carries those of far larger values than its own, its scale is the "largest" of them. Integers
    and booleans must be equal; NaN and infinities never pass.

    Raises:
        GoldenMismatchError: names the worst element.
    """
    if actual.shape != expected.shape:
        raise GoldenMismatchError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if actual.is_floating_point() != expected.is_floating_point():
        raise GoldenMismatchError(f"dtype {actual.dtype} instead of {expected.dtype}")
    if expected.numel() == 0:
        return
    result, golden = actual.cpu().double(), expected.double()
    error = (result - golden).abs()
    allowed = torch.zeros_like(error)
    if expected.is_floating_point():
        allowed = rtol * (golden.abs() + (golden.pow(2).mean().sqrt() if scale == "rms" else golden.abs().max()))
    wrong = ~(error <= allowed)
    if wrong.any():
        excess = torch.where(error.isnan(), torch.inf, error - allowed)
        worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise GoldenMismatchError(
            f"{int(wrong.sum())} of {wrong.numel()} values differ; worst at {worst}: {result[worst].item():.9g} instead "
            f"of {golden[worst].item():.9g} (allowed difference {allowed[worst].item():.3g})"
        )


def changeable_copy(case: Path, to: Path) -> Path:
    """A copy of a case's folder that can be written to: golden data are usually read-only, and copies inherit that."""
    shutil.copytree(case, to, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for folder in (to, *(path for path in to.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    return to


@lru_cache(maxsize=256)
def tensor_names(file: Path) -> frozenset[str]:
    """Names in a safetensors file; empty when it does not exist."""
    if not file.is_file():
        return frozenset()
    with safe_open(file, "pt") as handle:
        return frozenset(handle.keys())


def case_folders(*files: str) -> list[Path]:
    """Folders with one of these safetensors files; by default, those with results or weights of a case."""
    root = golden_root()
    found = (path for file in files or ("io", "weights") for path in root.rglob(f"{file}.safetensors"))
    return sorted({path.parent for path in found}) if root.is_dir() else []


def discover(
    *tensors: str,
    file: str = "io",
    weights: str | tuple[str, ...] = (),
    texts: str = "",
    where: Callable[[GoldenCase], bool] | None = None,
) -> list[GoldenCase]:
    """The cases that can serve a test.

    Args:
        tensors: shell patterns; each must match a tensor of `file`.
        file: stem of the safetensors file that holds them.
        weights: shell pattern(s); each must match a name in `weights.safetensors`.
        texts: stem of a JSON file that the case must hold; without `tensors` it needs no safetensors file.
        where: further condition, e.g. on the case's config.
    """
    weight_patterns = (weights,) if isinstance(weights, str) else weights
    found = []
    root = golden_root()
    for folder in sorted({path.parent for path in root.rglob(f"{texts}.json")}) if texts else case_folders(file):
        case = GoldenCase(folder)
        holds_tensors = all(case.names(pattern, file) for pattern in tensors)
        holds_weights = all(case.names(pattern, "weights") for pattern in weight_patterns)
        if holds_tensors and holds_weights and (where is None or where(case)):
            found.append(case)
    return found


def current_system() -> str:
    """The system that the running test is about; "" for any."""
    return system_of(os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0])


def system_of(test_file: str) -> str:
    """The system that a file of tests is about: "unimoe" of test_unimoe_8e.py; "" for any."""
    named = re.search(r"test_([a-z]+)_\w*\.py$", test_file)
    return named[1] if named else ""


def holds_case_of(system: str) -> bool:
    """Whether a test of the system found a case, or a case's folder, or one that it is in, is named after it."""
    if system in SYSTEMS_FOUND:
        return True
    root = golden_root()
    files = (path for pattern in ("*.safetensors", CASES_FILE) for path in root.rglob(pattern))
    return any(system in part for path in files for part in path.relative_to(root.parent).parts[:-1])


def leave_for_lack_of_data() -> NoReturn:
    """Ends a test that has no golden case: a skip, or in CI a failure when there is none of its system at all."""
    root, system = golden_root(), current_system()
    if root.is_dir() and running_in_ci() and not holds_case_of(system):
        pytest.fail(f"golden data missing: {root} holds no case of {system or 'any system'}; see {ROOT_VARIABLE}")
    if root.is_dir():
        pytest.skip(f"no golden case under {root} holds what this test compares")
    message = f"golden data missing: {root} is no folder; set {ROOT_VARIABLE} to the folder of golden cases"
    if running_in_ci():
        pytest.fail(message)
    pytest.skip(message)


@dataclass(frozen=True)
class Coverage:
    """What happened to the tensors of one golden file, or to the fields of a `cases.json`."""

    source: str
    compared: tuple[str, ...]
    only_read: tuple[str, ...]
    unused: tuple[str, ...]


def coverage(ledger: Ledger = LEDGER) -> list[Coverage]:
    """Coverage of every result file of every case, in order of their names."""
    root = golden_root()
    files = [file for folder in case_folders() for file in folder.glob("*.safetensors")]
    names = {_source(file): tensor_names(file) for file in files if file.stem not in _WEIGHT_FILES}
    names |= {_source(file): fields_of_cases(file) for file in (root.rglob(CASES_FILE) if root.is_dir() else ())}
    rows = []
    for source in sorted(names):
        compared = names[source] & ledger.compared.get(source, set())
        only_read = (names[source] & ledger.read.get(source, set())) - compared
        groups = (compared, only_read, names[source] - compared - only_read)
        rows.append(Coverage(source, *(tuple(sorted(group)) for group in groups)))
    return rows


def _source(file: Path) -> str:
    return file.with_suffix("").relative_to(golden_root()).as_posix()


def fields_of_cases(file: Path) -> frozenset[str]:
    """The fields in a `cases.json`: "cases.0.prompt" of the first entry of a list, "demo.prompts" of a named one."""
    data = json.loads(file.read_text(encoding="utf-8"))
    entries = data.items() if isinstance(data, dict) else ()
    lists = ((f"{kind}.{i}", entry) for kind, own in entries if isinstance(own, list) for i, entry in enumerate(own))
    named = ((kind, entry) for kind, entry in entries if not isinstance(entry, list))
    return frozenset(
        f"{name}.{part}" if part else name
        for name, entry in (*lists, *named)
        for part in (entry if isinstance(entry, dict) else ("",))
    )


def record_case(file: Path, kind: str, index: int, *, compared: Iterable[str], read: Iterable[str]) -> None:
    """Note which fields of an entry of a `cases.json` were compared, and which were inputs."""
    for fields, names in ((LEDGER.compared, compared), (LEDGER.read, read)):
        fields.setdefault(_source(file), set()).update(f"{kind}.{index}.{name}" for name in names)
