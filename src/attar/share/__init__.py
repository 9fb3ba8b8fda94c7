"""Clustering of weights into codebooks, and the edit that keeps them shared.

Works without a recipe: `share_weights(module, bits=4)` shares in place and returns the edit whose
`before_step` and `after_step` keep it so in a training loop of one's own.
"""

from attar.share.codebook import Codebook, cluster
from attar.share.edit import Assignment, Shared
from attar.share.importance import fisher_importance
from attar.share.kmeans import Clustering, kmeans
from attar.share.vectors import Vectors, cluster_vectors
from attar.share.weights import Sharing, share_weights, shareable

__all__ = [
    "Assignment",
    "Clustering",
    "Codebook",
    "Shared",
    "Sharing",
    "Vectors",
    "cluster",
    "cluster_vectors",
    "fisher_importance",
    "kmeans",
    "share_weights",
    "shareable",
]
