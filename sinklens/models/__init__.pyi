from .load import (
    Capabilities as Capabilities,
    PlainModel as PlainModel,
    capabilities as capabilities,
    untrained_twin as untrained_twin,
)
from .unbridged_proof import PlainCapabilities as PlainCapabilities

__all__: list[str]
