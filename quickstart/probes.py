"""Linear probes: what a logistic regression reads from frozen features, the yardstick for every accuracy."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class ProbeData:
    """Features [n, D], answers and, for the choice of the penalty, the group of each row (an artist, a voice)."""

    features: torch.Tensor
    answers: list[str]
    groups: list[str]


def probe_accuracy(train: ProbeData, test: ProbeData) -> float:
    """Accuracy on `test` of a multinomial logistic regression on standardised features.

    The L2 penalty is the one that does best on a fifth of the training groups, which the fit then has not seen.
    """
    names = sorted(set(train.answers))
    mean, std = train.features.float().mean(0), train.features.float().std(0) + 1e-4

    def design(data: ProbeData) -> tuple[torch.Tensor, torch.Tensor]:
        targets = torch.tensor([names.index(a) if a in names else -1 for a in data.answers])
        return ((data.features.float() - mean) / std).clamp(-10, 10), targets

    (train_x, train_y), (test_x, test_y) = design(train), design(test)
    groups = sorted(set(train.groups))
    validation_groups = set(groups[::5])
    held = torch.tensor([group in validation_groups for group in train.groups])
    penalty = WEIGHT_DECAYS[2]
    if held.any() and not held.all():
        scores = {
            decay: _score(_fit(train_x[~held], train_y[~held], len(names), decay), train_x[held], train_y[held])
            for decay in WEIGHT_DECAYS
        }
        penalty = max(scores, key=lambda decay: scores[decay])
    return _score(_fit(train_x, train_y, len(names), penalty), test_x, test_y)


def _fit(x_ND: torch.Tensor, y_N: torch.Tensor, num_classes: int, penalty: float) -> torch.Tensor:
    """Weights [D + 1, classes] of the penalised regression."""
    # More features than rows: the solution lies in the rows' span, so fit in that smaller space.
    basis_DK = torch.linalg.svd(x_ND, full_matrices=False).Vh.T if x_ND.shape[1] > len(x_ND) else None
    z_NK = x_ND if basis_DK is None else x_ND @ basis_DK
    weight = torch.zeros(z_NK.shape[1] + 1, num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z_NK @ weight[:-1] + weight[-1], y_N) + penalty * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = weight.detach()
    return weight if basis_DK is None else torch.cat([basis_DK @ weight[:-1], weight[-1:]])


def _score(weight: torch.Tensor, x_ND: torch.Tensor, y_N: torch.Tensor) -> float:
    predicted_N = (x_ND @ weight[:-1] + weight[-1]).argmax(-1)
    return float((predicted_N == y_N).float().mean())
