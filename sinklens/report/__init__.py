"""``write_report``: from a model and a text to one folder that others can read: a page, figures, tables, a manifest."""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
