"""Clustering of weights into codebooks, and the edit that keeps them shared.

Works without a recipe: `share_weights(module, bits=4)` shares in place and returns the edit whose
`before_step` and `after_step` keep it so in a training loop of one's own.
"""

from attar.share.codebook import Codebook, cluster
from attar.share.dkm import DifferentiableKMeans
from attar.share.edit import Assignment, Shared
from attar.share.folding import NormsFolded, fold_norms
from attar.share.hashed import Hashed, hash_student, hash_weights
from attar.share.importance import fisher_importance
from attar.share.kmeans import Clustering, kmeans
from attar.share.norms import round_norms
from attar.share.rate import RateDistortion, codable
from attar.share.vectors import Vectors, cluster_vectors
from attar.share.weights import Sharing, share_weights, shareable

__all__ = [
    "Assignment",
    "Clustering",
    "Codebook",
    "DifferentiableKMeans",
    "Hashed",
    "NormsFolded",
    "RateDistortion",
    "Shared",
    "Sharing",
    "Vectors",
    "cluster",
    "cluster_vectors",
    "codable",
    "fisher_importance",
    "fold_norms",
    "hash_student",
    "hash_weights",
    "kmeans",
    "round_norms",
    "share_weights",
    "shareable",
]
