"""Published losses on BatchNorm statistics, written out as plain loops with their published constants typed off."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from synthesis.guidance import CosineMargin
from synthesis.seeding import seeded, spawn
from tests.contract.first_step import FirstStep, moments, stored

BATCH, NOISE = 7, 14  # images a step; noise images that slacks are taken from
Terms = dict[str, float]


def bns(s: FirstStep) -> float:
    """(1/L) sum_l [ MSE(m_l, mu_l) + MSE(v_l, sigma_l^2) ], biased variances of the batch."""
    total = 0.0
    for path, x in s.norms.items():
        (mean, var, _), (mu, sigma2) = moments(x), stored(s.teacher, path)
        total += float(((mean - mu) ** 2).mean() + ((var - sigma2) ** 2).mean())
    return total / len(s.norms)


def sample_losses(s: FirstStep, slack: dict[str, tuple[float, float]]) -> list[list[float]]:
    """||[|m - mu| - d_mu]_+||^2 + ||[|s - sigma| - d_sigma]_+||^2 of each image (a row each) and layer."""
    rows = []
    for image in range(len(s.seen)):
        row = []
        for path, x in s.norms.items():
            (mean, _, var), (mu, sigma2) = moments(x[image : image + 1]), stored(s.teacher, path)
            far = [(mean - mu).abs(), ((var + 1e-6).sqrt() - sigma2.sqrt()).abs()]
            row.append(
                sum(float((gap - d).clamp_min(0).square().sum()) for gap, d in zip(far, slack[path], strict=True))
            )
        rows.append(row)
    return rows


def input_term(s: FirstStep) -> float:
    """mean_b [ ||m_0(x_b)||^2 + ||s_0(x_b) - 1||^2 ], unbiased."""
    found = [moments(image[None]) for image in s.images]
    return sum(float((m**2).sum() + (((v + 1e-6).sqrt() - 1) ** 2).sum()) for m, _, v in found) / len(found)


def cross_entropies(s: FirstStep) -> Tensor:
    """- sum_k y_k log p_k of each image."""
    return -(s.labels * (s.logits.exp() / s.logits.exp().sum(1, keepdim=True)).log()).sum(1)


def label_probability(s: FirstStep) -> Tensor:
    return (s.labels * s.logits.exp() / s.logits.exp().sum(1, keepdim=True)).sum(1)


def norms_of(differences: list[Tensor]) -> float:
    return sum(float(image.square().sum().sqrt()) for d in differences for image in d) / len(differences[0])


def total_variation(x: Tensor) -> float:
    """l2 norms of the horizontal, the vertical and both diagonal differences."""
    a, b, c, d = x[..., :-1, :-1], x[..., :-1, 1:], x[..., 1:, :-1], x[..., 1:, 1:]
    return norms_of([x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :], d - a, c - b])


def zeroq(s: FirstStep) -> Terms:
    losses = sample_losses(s, dict.fromkeys(s.norms, (0.0, 0.0)))
    return {"alignment": sum(map(sum, losses)) / BATCH, "input": input_term(s)}


def noise_slack(s: FirstStep) -> dict[str, tuple[float, float]]:
    """The 0.9 quantile of |m - mu| and |s - sigma| over all channels of all noise images."""
    network, rng = s.teacher, seeded(0, "slack")
    norms = {path: network.get_submodule(path) for path in s.norms}
    gaps: dict[str, tuple[list[float], list[float]]] = {path: ([], []) for path in norms}

    def keep(path: str, x: Tensor) -> None:
        mu, sigma2 = stored(network, path)
        for image in x.double():
            mean, _, var = moments(image[None])
            gaps[path][0].extend((mean - mu).abs().tolist())
            gaps[path][1].extend(((var + 1e-6).sqrt() - (sigma2 + 1e-6).sqrt()).abs().tolist())

    hooks = [m.register_forward_pre_hook(lambda _, x, path=path: keep(str(path), x[0])) for path, m in norms.items()]
    for _ in range(NOISE // BATCH):
        network(torch.randn(BATCH, *s.images.shape[1:], generator=rng))
    for hook in hooks:
        hook.remove()
    return {path: (float(np.quantile(a, 0.9)), float(np.quantile(b, 0.9))) for path, (a, b) in gaps.items()}


def dsg(s: FirstStep, enhanced: bool = True) -> Terms:
    """(1/N) 1^T (Id + 1 1^T) l: layer i counts once more on sample i."""
    losses = sample_losses(s, noise_slack(s))
    terms = {"sda": sum(map(sum, losses)) / BATCH, "input": input_term(s)}
    return terms | ({"lse": sum(losses[i][i] for i in range(BATCH)) / BATCH} if enhanced else {})


def sci(s: FirstStep) -> float:
    """1e-4 MSE(lambda_f, lambda_r) + sum_k minmax(lambda_r)_k (1 - |<e_f_k, e_r_k>|)."""
    rng = spawn(seeded(0, "decorrelation", 0, 0), torch.device("cpu"))
    noise = torch.randn(s.images.shape, generator=rng).double()
    rows = [
        x.flatten(1).numpy() / np.linalg.norm(x.flatten(1).numpy(), axis=1, keepdims=True) for x in (s.images, noise)
    ]
    (values, vectors), (wanted, directions) = (np.linalg.eigh(r @ r.T) for r in rows)
    importance = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    cosines = np.abs((vectors * directions).sum(0))
    return float(1e-4 * np.mean((values - wanted) ** 2) + np.sum(importance * (1 - cosines)))


def dsg_journal(s: FirstStep) -> Terms:
    rolled = s.module.priors["total_variation"].view(s.images, seeded(0, "total_variation", 0, 0))
    # the released code has batches of 40 without LSE
    weights = s.module.alignment.layer_weights(BATCH, len(s.norms), "sample", torch.device("cpu"))
    terms = dsg(s, enhanced=len(weights) > 1)
    return terms | {
        "sci": sci(s) / len(s.norms),
        "total_variation": 0.01 * total_variation(rolled),
        "l2": 0.01 * norms_of([s.images]),
    }


def deepinversion(s: FirstStep, r: float = 0.01, first: float = 10.0, tv: float = 1e-4, l2: float = 1e-5) -> Terms:
    layers = 0.0
    for path, x in s.norms.items():
        (mean, var, _), (mu, sigma2) = moments(x), stored(s.teacher, path)
        layers += (first if path == "bn1" else 1.0) * float((var - sigma2).norm() + (mean - mu).norm())
    terms = {"ce": float(cross_entropies(s).mean()), "alignment": r * layers, "tv": tv * total_variation(s.images)}
    return terms | ({"l2": l2 * norms_of([s.images])} if l2 else {})


def adaptive(s: FirstStep) -> Terms:
    """+ 0.2 (1 - JS), temperature 3, JS in bits."""
    assert s.answer is not None
    p, q = ((z / 3).exp() / (z / 3).exp().sum(1, keepdim=True) for z in (s.logits, s.answer))
    middle = (p + q) / 2
    js = ((p * (p / middle).log2()).sum(1) + (q * (q / middle).log2()).sum(1)).mean() / 2
    return deepinversion(s) | {"competition": 0.2 * (1 - float(js))}


def hast(s: FirstStep, b: float, g: float) -> Terms:
    return {"bns": bns(s), "hard": b * float(((1 - label_probability(s)) ** g * cross_entropies(s)).mean())}


def intraq(s: FirstStep, target: float, lower: float, upper: float) -> Terms:
    margin: CosineMargin = s.module.guides.terms["margin"]  # type: ignore[assignment]
    terms = {"bns": bns(s), "soft": float(((label_probability(s) - target) ** 2).mean())}
    if (lower, upper) == (0.0, 2.0):
        return terms
    total = 0.0
    for feature, label in zip(s.features, s.labels.argmax(1).tolist(), strict=True):
        centre = margin.sums[label].double() / margin.counts[label].double()
        d = 1 - float(feature @ centre / (feature.norm() * centre.norm()))
        total += max(lower - d, 0) + max(d - upper, 0)
    return terms | {"margin": total / BATCH}


def genie(s: FirstStep) -> Terms:
    """sum_l [ ||m - mu||^2 + ||s - sigma||^2 ] / C_l, unbiased, statistics of the batch."""
    layers = 0.0
    for path, x in s.norms.items():
        (mean, _, var), (mu, sigma2) = moments(x), stored(s.teacher, path)
        layers += float(((mean - mu) ** 2).mean() + (((var + 1e-6).sqrt() - (sigma2 + 1e-6).sqrt()) ** 2).mean())
    return {"alignment": layers, "input": input_term(s)}


def gdfq(s: FirstStep) -> Terms:
    return {"ce": float(cross_entropies(s).mean()), "bns": 0.1 * bns(s)}
