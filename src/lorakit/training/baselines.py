"""What a classifier must beat: the majority class, and a linear probe on the frozen base.

The probe is a multinomial logistic regression on the mean of the base's last hidden states over each
text's tokens, standardised, with a small L2 penalty, fitted by L-BFGS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.records import Evaluation
from lorakit.text.generate import evaluating
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.scores import bounded_batches, class_scores

PROBE_ROWS = 4000


def majority(train: Sequence[EncodedRow], held: Sequence[EncodedRow], labels: Sequence[str]) -> Evaluation:
    """Score always predicting the most frequent class of ``train``; its loss is that of the class shares."""
    counts = Counter(_class(row) for row in train)
    shares = torch.tensor([counts[i] + 1.0 for i in range(len(labels))])
    winner = int(shares.argmax())
    confusion = [[0] * len(labels) for _ in labels]
    for row in held:
        confusion[_class(row)][winner] += 1
    log_shares = (shares / shares.sum()).log()
    loss = -float(sum(log_shares[_class(row)] for row in held)) / max(len(held), 1)
    return class_scores(confusion, labels, loss)


def linear_probe(
    model: nn.Module, train: Sequence[EncodedRow], held: Sequence[EncodedRow], collate: Collator, labels: Sequence[str]
) -> Evaluation | None:
    """Fit and score a linear probe on the frozen base's features; None where the model does not show them.

    At most 4,000 training rows are taken, evenly spaced: files are often sorted by class.
    """
    taken = train[:: -(-len(train) // PROBE_ROWS)]
    x, held_x = features(model, taken, collate), features(model, held, collate)
    if x is None or held_x is None:
        return None
    y, truth = torch.tensor([_class(row) for row in taken]), torch.tensor([_class(row) for row in held])
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / deviation
    weight = torch.zeros(len(labels), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(labels), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + weight.square().sum() * (0.5 / len(x))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        logits = F.linear((held_x - mean) / deviation, weight, bias)
        loss = float(F.cross_entropy(logits, truth))
    pairs = truth * len(labels) + logits.argmax(-1)
    confusion = torch.bincount(pairs, minlength=len(labels) ** 2).view(len(labels), len(labels))
    return class_scores(confusion.tolist(), labels, loss)


@torch.no_grad()
def features(model: nn.Module, rows: Sequence[EncodedRow], collate: Collator) -> Tensor | None:
    """Return each row's mean last hidden state, ``[rows, width]`` in fp32 on the CPU.

    None for a model that does not return hidden states, or not one for each token.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = []
    order: list[int] = []
    with evaluating(model):
        for numbers in bounded_batches(rows):
            batch = {k: v.to(device) for k, v in collate([rows[i] for i in numbers]).items() if k != "labels"}
            hidden = model(**batch, output_hidden_states=True)
            states = hidden.get("hidden_states") or hidden.get("encoder_hidden_states")
            if not states or states[-1].shape[:2] != batch["attention_mask"].shape:
                return None
            mask = batch["attention_mask"][..., None].to(states[-1].dtype)
            found.append(((states[-1] * mask).sum(1) / mask.sum(1).clamp_min(1)).float().cpu())
            order += numbers
    place = torch.tensor(order).argsort()
    return torch.cat(found)[place]


def _class(row: EncodedRow) -> int:
    assert isinstance(row.labels, int)
    return row.labels
