from .attention import LabAttention as LabAttention
from .bigrams import BigramBackcopy as BigramBackcopy, Recall as Recall
from .comparison import LabComparison as LabComparison, compare as compare
from .kinds import KINDS as KINDS, AttentionKind as AttentionKind
from .model import LabModel as LabModel, ModelConfig as ModelConfig
from .run import (
    LabRun as LabRun,
    load_lab_model as load_lab_model,
    load_runs as load_runs,
    run_study as run_study,
    save_lab_model as save_lab_model,
)
from .schedule import TrainConfig as TrainConfig
from .study import LabConfig as LabConfig, Study as Study, read_study as read_study, studies as studies
from .tasks import Backcopy as Backcopy, Batch as Batch
from .text import Text as Text, write_tokens as write_tokens
from .training import Training as Training, train as train

__all__: list[str]
