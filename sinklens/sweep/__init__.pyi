from .jobs import Job as Job, load_jobs as load_jobs, make_jobs as make_jobs
from .processes import Processes as Processes
from .ray_executor import RayExecutor as RayExecutor
from .results import SweepResults as SweepResults, collect as collect
from .runner import run_sweep as run_sweep
from .specs import (
    InterventionSpec as InterventionSpec,
    ModelSpec as ModelSpec,
    TaskSpec as TaskSpec,
    TextSpec as TextSpec,
)
from .status import SweepStatus as SweepStatus, sweep_status as sweep_status
from .submitit_executor import SubmititExecutor as SubmititExecutor

__all__: list[str]
