"""PMRL's loss as an ordinary, cheap, always-finite PyTorch loss.

Aligns k modalities by pushing up the largest singular value of each instance's d x k embedding matrix
(*Principled Multimodal Representation Learning*, arXiv 2507.17343), through k x k Gram matrices instead of
singular value decompositions.
"""

from .chunks import Chunked, in_chunks
from .compilation import warm_up
from .diagnostics import alignment_score, effective_rank, uniformity
from .joint import gram_loss, joint_contrastive_loss, joint_scores, triangle_loss
from .losses import PMRLComponents, dominant_sv_loss, instance_contrastive_loss, pmrl_loss
from .matching import Matched, by_id
from .modules import DominantSVLoss, GRAMLoss, JointContrastiveLoss, PMRLLoss, TRIANGLELoss
from .retrieval import Recall, Retrieved, recall_at, retrieval_ranks, retrieval_topk
from .spectral import DominantTriplet, dominant_singular_triplet, dominant_singular_value, singular_values

__version__ = "0.1.0"

__all__ = [
    "Chunked",
    "DominantSVLoss",
    "DominantTriplet",
    "GRAMLoss",
    "JointContrastiveLoss",
    "Matched",
    "PMRLComponents",
    "PMRLLoss",
    "Recall",
    "Retrieved",
    "TRIANGLELoss",
    "alignment_score",
    "by_id",
    "dominant_singular_triplet",
    "dominant_singular_value",
    "dominant_sv_loss",
    "effective_rank",
    "gram_loss",
    "in_chunks",
    "instance_contrastive_loss",
    "joint_contrastive_loss",
    "joint_scores",
    "pmrl_loss",
    "recall_at",
    "retrieval_ranks",
    "retrieval_topk",
    "singular_values",
    "triangle_loss",
    "uniformity",
    "warm_up",
]
