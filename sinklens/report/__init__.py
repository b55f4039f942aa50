"""``write_report``: from a model and a text to one folder that others can read: a page, figures, tables, a manifest."""

from sinklens.report.write import write_report

__all__ = ["write_report"]
