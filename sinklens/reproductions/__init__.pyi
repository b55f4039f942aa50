from .catalogue import CATALOGUE as CATALOGUE
from .claims import (
    Above as Above,
    Below as Below,
    Claim as Claim,
    Entry as Entry,
    Equals as Equals,
    Quantity as Quantity,
    Setting as Setting,
    verdict as verdict,
)
from .originals import ORIGINALS as ORIGINALS, Original as Original, Subject as Subject
from .result import Reproductions as Reproductions
from .run import reproduce as reproduce

__all__: list[str]
