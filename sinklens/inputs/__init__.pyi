from .images import Images as Images
from .sample_images import sample_images as sample_images
from .vocabulary import NamedTokens as NamedTokens, named_tokens as named_tokens

__all__: list[str]
