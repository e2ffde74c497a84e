"""What a person reads: the results of runs as `result.json`, and the report page made from it."""

from sfumato.report.html import render, write_report
from sfumato.report.result import (
    Accountants,
    Curves,
    DatasetInfo,
    LedgerEntry,
    LedgerExtract,
    Metrics,
    Privacy,
    Result,
    Run,
    Sampling,
    Score,
    read_result,
    write_result,
)

__all__ = [
    "Accountants",
    "Curves",
    "DatasetInfo",
    "LedgerEntry",
    "LedgerExtract",
    "Metrics",
    "Privacy",
    "Result",
    "Run",
    "Sampling",
    "Score",
    "read_result",
    "render",
    "write_report",
    "write_result",
]
