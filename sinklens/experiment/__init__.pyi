from .ablation_sweep_result import Sweep as Sweep
from .bos_variants import BosVariants as BosVariants, bos_variants as bos_variants
from .matched_damage import MatchedDamage as MatchedDamage, matched_damage as matched_damage
from .page import write_experiment as write_experiment
from .result import Experiment as Experiment

__all__: list[str]
