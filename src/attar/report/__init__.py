"""The ledger for people: as a page, as a table on the terminal or in a notebook, side by side."""

from attar.report.compare import compare_reports
from attar.report.page import write_report
from attar.report.table import ledger_html, ledger_table

__all__ = ["compare_reports", "ledger_html", "ledger_table", "write_report"]
