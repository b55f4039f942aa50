from .claims import (
    norm_and_mass as norm_and_mass,
    primary_weakening as primary_weakening,
    sink_levels as sink_levels,
    writer_alignment as writer_alignment,
)
from .neurons import Neurons as Neurons, writer_neurons as writer_neurons
from .page import write_trace as write_trace
from .planting import plant_sinks as plant_sinks
from .result import SinkTrace as SinkTrace
from .subspace import writer_subspace as writer_subspace
from .verdicts import Verdict as Verdict

__all__: list[str]
