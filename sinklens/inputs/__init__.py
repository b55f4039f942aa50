"""What a model reads: texts, corpora, images and their tokens."""

from sinklens.core.lazy import attach_stub
from sinklens.inputs import images as _images  # noqa: F401  (a file that holds images is read as images)

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
