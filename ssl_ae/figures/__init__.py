"""Pictures for a run's folder and for MLflow: plain numpy arrays in, one PNG out. The only owner of matplotlib.

Importing matplotlib and scikit-learn takes a second, so stages import this module where they draw, never at the top.
Every function writes its file whole or not at all and returns its path. Figures are made without pyplot, hence without
global state: two threads may draw at once. Wrong arrays are a caller's mistake and raise ValueError.
"""

from ssl_ae.figures.confusion import confusion_matrix
from ssl_ae.figures.curves import learning_curves
from ssl_ae.figures.label_curve import label_curve
from ssl_ae.figures.map import latent_map
from ssl_ae.figures.neighbours import MAX_NEIGHBOURS, MAX_QUERIES, neighbours
from ssl_ae.figures.samples import reconstructions, sample_grid
from ssl_ae.figures.sheets import Side, latent_interpolation, latent_plane, latent_traversal, numbered, sample_sheet
from ssl_ae.figures.tiles import draw

__all__ = [
    "MAX_NEIGHBOURS",
    "MAX_QUERIES",
    "Side",
    "confusion_matrix",
    "draw",
    "label_curve",
    "latent_interpolation",
    "latent_map",
    "latent_plane",
    "latent_traversal",
    "learning_curves",
    "neighbours",
    "numbered",
    "reconstructions",
    "sample_grid",
    "sample_sheet",
]
