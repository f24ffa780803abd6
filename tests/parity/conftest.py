"""Feeds golden cases to the tests that ask for them, and reports what no test compared."""

from collections.abc import Iterator
from typing import Any

import pytest
from golden import (
    LEDGER,
    REPORT_VARIABLE,
    ROOT_VARIABLE,
    SYSTEMS_FOUND,
    GoldenCase,
    coverage,
    discover,
    golden_root,
    leave_for_lack_of_data,
    report_level,
    system_of,
)
from name_lists import listed

_SHOWN = 6  # names per line of the summary


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "golden(*tensors, file='io', weights=(), texts='', where=None): run once per case that holds these"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None or "golden_case" not in metafunc.fixturenames:
        return
    cases: list[GoldenCase | None] = [*discover(*marker.args, **marker.kwargs)]
    if cases:
        SYSTEMS_FOUND.add(system_of(metafunc.definition.path.name))
    names = [case.name for case in cases if case is not None]
    metafunc.parametrize("golden_case", cases or [None], ids=names or ["no-golden-data"], indirect=True)


@pytest.fixture
def golden_case(request: pytest.FixtureRequest) -> Iterator[GoldenCase]:
    """The golden case of this run of the test; without one the test is skipped, or fails in CI."""
    case: GoldenCase | None = getattr(request, "param", None)
    if case is None:
        leave_for_lack_of_data()
    comparisons_before = case.comparisons
    yield case
    if case.comparisons == comparisons_before:
        pytest.skip(f"{case.name} holds the inputs of this test but no result: nothing was compared")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("golden data")
    if not golden_root().is_dir():
        terminalreporter.write_line(
            f"MISSING: {golden_root()} is no folder, so NO parity test ran. Set {ROOT_VARIABLE}.", red=True, bold=True
        )
        return
    shown = _SHOWN if report_level() == "summary" else None
    for row in coverage():
        if shown is not None and not row.compared and not row.only_read:
            terminalreporter.write_line(f"{row.source}: {len(row.unused)} not used: {listed(row.unused, shown)}")
            continue
        terminalreporter.write_line(
            f"{row.source}: {len(row.compared)} compared, {len(row.only_read)} only read as inputs, "
            f"{len(row.unused)} not used"
        )
        for title, names in (("only read as inputs", row.only_read), ("not used", row.unused)):
            if names:
                terminalreporter.write_line(f"    {title}: {listed(names, shown)}")
    if report_level() == "summary":
        terminalreporter.write_line(f"{REPORT_VARIABLE}=list names all of them")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    worker_output = getattr(session.config, "workeroutput", None)
    if worker_output is not None:
        worker_output["golden_ledger"] = LEDGER.as_plain()
    elif report_level() == "strict" and any(row.unused for row in coverage()) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collects the records of a pytest-xdist worker."""
    LEDGER.merge(getattr(node, "workeroutput", {}).get("golden_ledger", {}))
