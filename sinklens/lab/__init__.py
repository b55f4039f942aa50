"""Small models trained from scratch, with any kind of attention, in which sinks can be watched as they grow.

>>> from sinklens import lab
>>> runs = lab.run_study("operations", "lab-out")        # nine kinds of attention x three seeds, minutes on a laptop
>>> comparison = lab.compare(runs)
>>> comparison.operations_table()
>>> comparison.plot()
>>> model = runs[0].model()                              # an ordinary bridge for every function of sinklens
"""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
