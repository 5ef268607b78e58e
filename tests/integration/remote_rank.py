"""The probe of :mod:`tests.integration.worker_probe` in ranks that are made strangers to their
server's directory (:mod:`scripts.harness.remote_rank`)."""

from __future__ import annotations

from scripts.harness.remote_rank import RANKS, RemoteRank
from tests.integration.worker_probe import WorkerProbe

NAME = f"{__name__}.RemoteProbe"
__all__ = ["NAME", "RANKS", "RemoteProbe"]


class RemoteProbe(WorkerProbe, RemoteRank):
    """Tells what the worker itself counts."""
