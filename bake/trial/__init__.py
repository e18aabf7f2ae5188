"""`bake sweep`: one trial of a direction on a model, written to a directory.

`options` is what is asked for, `run` does it, `results` is what came out; `files`, `page` and
`description` tell it. What is measured, and how, is `bake.dose_response`.
"""

from bake.trial.description import describe
from bake.trial.options import TrialOptions, load_scorer
from bake.trial.results import Trial
from bake.trial.run import sweep

__all__ = ["Trial", "TrialOptions", "describe", "load_scorer", "sweep"]
