from .page import write_decomposition as write_decomposition
from .result import SinkDecomposition as SinkDecomposition, Subject as Subject
from .two_by_two import Claims as Claims, TwoByTwo as TwoByTwo

__all__: list[str]
