# SPDX-License-Identifier: Apache-2.0
"""pytest plugin: writes the outcome of every test as it is known, one JSON line each.

A test counts as crashed until it has finished, so the file is true even if the process dies, and a
second process given the same file leaves out every test that the first one started.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

LOG = Path(os.environ["ENGINE_TESTS_LOG"])
TEST_LIMIT_S = float(os.environ["ENGINE_TESTS_LIMIT_S"])
DETAIL_CHARS = 4000
# Taken before pytest captures it, or the stacks of a test that hangs would be lost with it.
STDERR = os.dup(2)


class Recorder:
    def __init__(self) -> None:
        self.started = {line["test"] for line in _lines()}
        self.outcome, self.detail, self.began = "", "", 0.0

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        again = [item for item in items if item.nodeid in self.started]
        if again:
            config.hook.pytest_deselected(items=again)
            items[:] = [item for item in items if item.nodeid not in self.started]

    def pytest_collection_finish(self) -> None:
        # The engine's fixtures collect garbage after each test, and a heap with torch and an engine
        # in it takes longer than most of the tests. What lives here lives to the end: leave it out.
        gc.collect()
        gc.freeze()
        gc.unfreeze = lambda: None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            outcome = "error" if report.failed else "skipped"
            _write(report.nodeid, outcome, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.detail, self.began = "", "", time.monotonic()
        _write(nodeid, "crashed", "the process died or this test ran past its time")
        faulthandler.dump_traceback_later(TEST_LIMIT_S, exit=True, file=STDERR)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown" or report.failed:
            self.outcome = _outcome(report)
        if report.failed:
            self.detail += f"{report.when}:\n{report.longreprtext}\n"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        _write(nodeid, self.outcome, self.detail, time.monotonic() - self.began)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        _write("", "end")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder())


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    if report.failed:
        return "failed" if report.when == "call" else "error"
    return report.outcome


def _lines() -> list[dict[str, Any]]:
    if not LOG.exists():
        return []
    return [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]


def _write(test: str, outcome: str, detail: str = "", seconds: float = 0.0) -> None:
    line = json.dumps(
        {
            "test": test,
            "outcome": outcome,
            "detail": detail[-DETAIL_CHARS:],
            "seconds": round(seconds, 3),
        }
    )
    with LOG.open("a", encoding="utf-8") as log:
        log.write(line + "\n")
