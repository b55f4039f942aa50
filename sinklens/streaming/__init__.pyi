from .attention import streaming_attention as streaming_attention
from .cache import StreamingCache as StreamingCache
from .eviction import EvictionStudy as EvictionStudy, eviction_study as eviction_study
from .loss import StreamingLoss as StreamingLoss, streaming_loss as streaming_loss
from .page import write_streaming as write_streaming

__all__: list[str]
