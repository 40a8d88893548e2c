"""Training appends to a journal, a background thread delivers it to MLflow, `sync` delivers it later.

Nothing here imports mlflow before the background thread, `sync` or a served model needs it: that import takes 3 s.
"""

from ssl_ae.tracking.reach import Unreachable, reach
from ssl_ae.tracking.store import live_store, store_uri
from ssl_ae.tracking.sync import sync
from ssl_ae.tracking.tracker import Tracker
from ssl_ae.tracking.ui import ui

__all__ = ["Tracker", "Unreachable", "live_store", "reach", "store_uri", "sync", "ui"]
