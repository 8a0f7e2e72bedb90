"""`Session`: one loaded model, and the Python API over it."""

from nblens.session.fitting import LensFitting
from nblens.session.measuring import Measuring
from nblens.session.reading import Reading

__all__ = ["Session"]


class Session(Reading, Measuring, LensFitting):
    """One model, and everything that can be asked of it. Made by `load` and `attach`.

    >>> session = nblens.load()
    >>> traj = session.lens("The capital of France is", top_k=3)
    >>> traj.n_layers
    12

    Requests run one at a time on a worker thread while the caller waits; Ctrl-C stops a run within a token and
    raises `Interrupted`, which holds what was read until then.
    """
