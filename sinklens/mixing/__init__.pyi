from .by_length import mixing_by_length as mixing_by_length
from .collapse import Collapse as Collapse, measure_collapse as measure_collapse
from .conditions import MixingConditions as MixingConditions, mixing_conditions as mixing_conditions
from .page import write_mixing as write_mixing
from .pair_norms import jacobian_norms as jacobian_norms
from .path_sum import PathSums as PathSums, path_sums as path_sums
from .perturbation import perturbation_spread as perturbation_spread
from .perturbation_result import Perturbation as Perturbation
from .result import Mixing as Mixing, MixingComparison as MixingComparison

__all__: list[str]
