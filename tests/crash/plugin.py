"""Tells at the end of a run at how many points which operation was killed and interrupted.

A test hands its lines over with `record_property(SUMMARY, line)`; reports carry them to the process
that started the run, whichever worker ran the test.
"""

from __future__ import annotations

import pytest

SUMMARY = "crash summary"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        str(text)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for key, text in report.user_properties
        if key == SUMMARY
    ]
    if lines:
        terminalreporter.section("deaths and interruptions")
        for line in sorted(lines):
            terminalreporter.write_line(line)
