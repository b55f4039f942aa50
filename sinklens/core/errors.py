"""The exceptions and warnings of sinklens: one family, so that one ``except`` catches all."""


class SinklensError(Exception):
    """Base class of every error that sinklens raises on purpose."""


class BadInputError(SinklensError, ValueError):
    """The input cannot be used; the message says what was wrong and what to do."""


class UnsupportedModelError(SinklensError):
    """The model lacks a capability; the message names it and what would work instead."""


class SinklensWarning(UserWarning):
    """Something that does not stop the work but that the reader of a number should know."""
