"""What the raters say together: the probable truth of each unit, and each rater's errors against it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlhf_kit.feedback.agreement import UNIT, units_of
from rlhf_kit.feedback.judging import FeedbackError

Array = NDArray[np.float64]
LEAST = 1e-10  # of a probability, so that its logarithm is finite


class Consensus(NamedTuple):
    """What Dawid and Skene's model makes of judgments.

    `posterior`: `item, unit`, a column of probability per value, and `value`, the most probable one (NaN where several
    are). `confusion`: `rater, truth`, a column per value: P(the rater says it | truth).
    """

    posterior: pd.DataFrame
    confusion: pd.DataFrame


def dawid_skene(judgments: pd.DataFrame, question: str | None = None, steps: int = 100) -> Consensus:
    """Dawid and Skene (1979) of all raters' values of each unit: a truth per unit, an error matrix per rater.

    Raters are taken to err independently of each other, given the truth. A pair counts in both orders, so what a rater
    does to a pair does not depend on which completion the item names first. Raises FeedbackError where no unit was
    judged, or several questions were and none is named.
    """
    found = units_of(judgments, question)
    if found.empty:
        raise FeedbackError(f"dawid_skene: all {len(judgments)} judgments are skipped or withdrawn")
    question = found["question"].iloc[0]
    domain = sorted({*found["value"], *([-1, 1] if question == "rank" else [])})
    table = found.pivot(index=UNIT[1:], columns="rater", values="value")
    labels = np.full(table.shape, -1)
    for k, value in enumerate(domain):
        labels[table.to_numpy() == value] = k
    both = labels
    if question == "rank":  # the domain is symmetric: reversing it is reversing the pair
        both = np.vstack([labels, np.where(labels < 0, -1, len(domain) - 1 - labels)])
    truth, confusion = expectation_maximisation(both, len(domain), steps)
    truth = truth[: len(table)]
    posterior = pd.DataFrame(truth, columns=domain, index=table.index).reset_index()
    best = np.isclose(truth, truth.max(1, keepdims=True))
    posterior["value"] = np.where(best.sum(1) == 1, np.array(domain)[truth.argmax(1)], np.nan)
    index = pd.MultiIndex.from_product([table.columns, domain], names=["rater", "truth"])
    errors = pd.DataFrame(confusion.reshape(-1, len(domain)), index=index, columns=domain).reset_index()
    return Consensus(posterior, errors)


def expectation_maximisation(labels: NDArray[np.int64], n_values: int, steps: int = 100) -> tuple[Array, Array]:
    """Truth [U, V] and errors [R, V (truth), V (said)] from labels [U, R] in 0..V-1, -1 where a rater said nothing.

    EM from the share of votes: with T the truth, prior_k = mean_u T_uk and errors_rkl = sum_u T_uk [u has l from r] /
    sum_u T_uk [u has any from r]; then T_uk is in proportion to prior_k prod_r errors_rk,said. It ends when T stands
    still or after `steps`. A truth that no unit of a rater may have leaves that row of errors even.

    Written here, for crowd-kit, which has it too, brings nltk and scikit-learn along; a test holds both together.
    """
    said = (labels[:, :, None] == np.arange(n_values)).astype(float)  # (U, R, V)
    truth = said.sum(1) / said.sum((1, 2))[:, None]
    for _ in range(steps):
        errors = np.maximum(np.einsum("uk,url->rkl", truth, said), LEAST)
        errors /= errors.sum(2, keepdims=True)
        logs = np.log(np.maximum(truth.mean(0), LEAST)) + np.einsum("url,rkl->uk", said, np.log(errors))
        before, truth = truth, np.exp(logs - logs.max(1, keepdims=True))
        truth /= truth.sum(1, keepdims=True)
        if np.abs(truth - before).max() < 1e-9:
            break
    errors = np.maximum(np.einsum("uk,url->rkl", truth, said), LEAST)
    return truth, errors / errors.sum(2, keepdims=True)
