"""Many jobs: models x texts x interventions x tasks x seeds, resumable, on any executor.

>>> from sinklens.sweep import collect, make_jobs, run_sweep
>>> text = {"source": "python-docs", "n_seqs": 32, "seq_len": 64, "pieces": 4}
>>> edits = ["none", {"build": "ablate_sinks", "sinks": [0], "mode": "zero"}]
>>> jobs = make_jobs("smollm2-135m", text, edits, tasks=["sink_scores", "token_loss"])
>>> run_sweep(jobs, "results", executor="processes", workers=2)
>>> collect("results").summary()

A job is plain data. Its result lies in a file named by the hash of everything that it depends on, so a restart runs
what is missing and nothing else. The executor is borrowed: standard library, Ray, submitit, or the caller's own.

Not to be confused with :func:`sinklens.sweep_ablation` (``sinklens/sweeps.py``), which takes *one* ablation of *one*
loaded model along layers, heads or doses. How to: docs/sweeps.md; beyond one machine: docs/scale.md.
"""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
