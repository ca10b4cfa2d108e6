"""Contrastive losses with a mask of positives: SimCLR, SupCon, and EBD's semi-supervised mixture of both (SS-CTL).

SimCLR is the mask in which nothing may attract, SupCon the one in which everything may.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backdoor_bench.training.precision import full_float32


def positive_mask(labels: Tensor, may_attract: Tensor, asymmetric: bool = False) -> Tensor:
    """bool [B, B]: True where the image of the column is a positive of the image of the row.

    Every image is one of itself (its other view); two images of one label are where both ``may_attract`` (EBD Eq. 2).
    labels: int64 [B]; may_attract: bool [B]. asymmetric: the row alone decides, so that an image which may attract is
    also pulled to images of its label which may not (SCLBD/Effective_backdoor_defense:ST/losses.py).
    """
    allowed = may_attract[:, None].expand(-1, len(labels)) if asymmetric else may_attract[:, None] & may_attract
    alike = labels[:, None] == labels
    return (alike & allowed) | torch.eye(len(labels), dtype=torch.bool, device=labels.device)


def contrastive_loss(projections: Tensor, positives: Tensor, temperature: float, base_temperature: float) -> Tensor:
    """Scalar: over all 2B views a the mean of -(T / T0) mean_p [s_ap / T - log sum_{k != a} exp(s_ak / T)].

    p runs over the other views of the positives of a's image and k over all other views; s is the dot product, T
    ``temperature``, T0 ``base_temperature``. projections: float [2B, D] of length 1, the first views of all images and
    then their second ones; positives: bool [B, B] with a true diagonal. In float32, without TF32, whatever the run's
    precision (a temperature of 0.1 magnifies the rounding of the similarities; their gradient may use TF32). Source: EBD
    Eqs. 9-11, HobbitLong/SupContrast:losses.py.
    """
    with full_float32(projections.device):
        unit = projections.float()
        similarity = unit @ unit.T / temperature
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        log_share = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
        pulled = (positives.repeat(2, 2) & ~itself).float()
        attraction = (log_share * pulled).sum(1) / pulled.sum(1)
        return -(temperature / base_temperature) * attraction.mean()
