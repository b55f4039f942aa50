import os
import typing

from . import (
    ablate as ablate,
    check as check,
    decompose as decompose,
    experiment as experiment,
    find as find,
    heads as heads,
    inputs as inputs,
    lab as lab,
    mixing as mixing,
    models as models,
    report as report,
    reproductions as reproductions,
    streaming as streaming,
    sweep as sweep,
    trace as trace,
)
from .ablate.ablate import ablate_sinks as ablate_sinks
from .ablate.patch_bos import patch_bos as patch_bos
from .ablate.residual import ablate_residual as ablate_residual
from .ablate.swap import restrict_attention as restrict_attention, swap_attention as swap_attention
from .attention.backend import Flash as Flash
from .attention.flash import flash as flash
from .check.check import check_model as check_model
from .core.errors import (
    BadInputError as BadInputError,
    SinklensError as SinklensError,
    SinklensWarning as SinklensWarning,
    UnsupportedModelError as UnsupportedModelError,
)
from .decompose.decompose import decompose_sinks as decompose_sinks
from .experiment.ablation_sweep import sweep_ablation as sweep_ablation
from .experiment.experiment import run_experiment as run_experiment
from .find.anatomy import sink_anatomy as sink_anatomy
from .find.scores import SinkScores as SinkScores, sink_scores as sink_scores
from .find.sinkmap import SinkMap as SinkMap
from .find.sinks import find_sinks as find_sinks
from .forward.metrics import token_loss as token_loss
from .heads.maps import attention_map as attention_map
from .inputs.images import load_images as load_images
from .inputs.load import load_tokens as load_tokens
from .inputs.tokens import Tokens as Tokens
from .mixing.mixing import compare_mixing as compare_mixing, measure_mixing as measure_mixing
from .models.load import load_model as load_model
from .report.write import write_report as write_report
from .reproductions.run import reproduce as reproduce
from .trace.trace import trace_sinks as trace_sinks

__version__: str
__all__: list[str]
_MOVED: dict[str, str]
_READERS: dict[str, str]

def load(path: str | os.PathLike[str]) -> typing.Any: ...
