from .anatomy import Anatomy as Anatomy
from .contexts import compare_contexts as compare_contexts
from .image_figures import image_map as image_map
from .images_page import write_images as write_images
from .lifetimes import Thresholds as Thresholds
from .registers import Registers as Registers, register_tokens as register_tokens
from .scan_page import write_scan as write_scan
from .sinkmap import Sink as Sink
from .sinks import compare_methods as compare_methods
from .sinks_page import write_sinks as write_sinks

__all__: list[str]
