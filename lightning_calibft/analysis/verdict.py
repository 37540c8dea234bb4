"""What the measurements of a fit mean, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_calibft._arguments import check_items
from lightning_calibft.analysis.history import Evaluation, Snapshot

_GENTLER = "Fine-tune more gently: a smaller learning rate, fewer epochs, or frozen early layers."


def verdict(snapshots: Sequence[Snapshot]) -> list[str]:
    """Say whether gamma helps, whether calibration can help at all, and what the head's weights and logits tell.

    A difference counts if it exceeds two standard errors of an accuracy on that many samples.

    Args:
        snapshots: The snapshots of a fit in order, the first from before or early in training.

    Returns:
        Sentences, the most important ones first.

    Example:
        >>> from lightning_calibft.analysis import Snapshot, verdict
        >>> verdict([Snapshot(epoch=0, step=0)])[0]
        'No validation had labeled samples of both seen and absent classes, so it is unknown whether gamma helps...'
    """
    check_items("snapshots", snapshots, Snapshot)
    evaluated = [each for each in snapshots if each.evaluation is not None]
    if not evaluated:
        return [
            "No validation had labeled samples of both seen and absent classes, so it is unknown whether gamma helps"
            " and whether the features of absent classes are still good. All other results here are about the weights.",
            *_about_updates(snapshots),
        ]
    return [
        _about_features(evaluated),
        _about_gamma(evaluated[-1]),
        *_about_levels(evaluated),
        *_about_updates(snapshots),
    ]


def degraded(first: Snapshot, last: Snapshot) -> list[str]:
    """Return which of ``AUSUC`` and ``Acc_U/U``, which do not depend on gamma, fell between two validations."""
    before, after = _evaluation(first), _evaluation(last)
    num_seen, num_absent = _counts(last)
    falls = {
        "AUSUC": (before.ausuc, after.ausuc, min(num_seen, num_absent)),
        "Acc_U/U": (before.groups.absent_among_absent, after.groups.absent_among_absent, num_absent),
    }
    return [name for name, (old, new, count) in falls.items() if old - new > _noise(old, count)]


def _about_features(evaluated: Sequence[Snapshot]) -> str:
    first, last = evaluated[0], evaluated[-1]
    before, after = _evaluation(first), _evaluation(last)
    numbers = (
        f"Between {_when(first)} and {_when(last)}, AUSUC went from {before.ausuc:.3f} to {after.ausuc:.3f}, and"
        f" Acc_U/U, the accuracy on absent samples among the absent classes alone, went from"
        f" {_percent(before.groups.absent_among_absent)} to {_percent(after.groups.absent_among_absent)}. Neither"
        " depends on gamma."
    )
    if len(evaluated) == 1:
        text = (
            f"A single validation (AUSUC {after.ausuc:.3f}, Acc_U/U {_percent(after.groups.absent_among_absent)})"
            f" cannot show whether fine-tuning has degraded the features of absent classes. {_baseline(first)}"
        )
        return text.strip()
    if fallen := degraded(first, last):
        best = max(evaluated, key=lambda each: _evaluation(each).ausuc)
        return (
            f"CALIBRATION CANNOT HELP with all of the loss: fine-tuning has degraded the features of absent classes"
            f" ({' and '.join(fallen)} fell). {numbers} Gamma only chooses a point on the seen-unseen curve, and the"
            f" whole curve has dropped. {_GENTLER} AUSUC was best, {_evaluation(best).ausuc:.3f}, at {_when(best)}."
        )
    return f"The features of absent classes have held up. {numbers} {_baseline(first)}".strip()


def _baseline(first: Snapshot) -> str:
    if first.step == 0:
        return ""
    return (
        f"Anything lost before the first validation, at {_when(first)}, is not visible here. Run `trainer.validate`"
        " before `trainer.fit` to include the model before fine-tuning."
    )


def _about_gamma(last: Snapshot) -> str:
    now, counts = _evaluation(last), _counts(last)
    plain = (
        f"without it, {_percent(now.overall)} of the samples are classified correctly"
        f" ({_percent(now.groups.seen_among_all)} of seen and {_percent(now.groups.absent_among_all)} of absent ones)"
    )
    if now.best_overall - now.overall <= _noise(now.overall, sum(counts)):
        return (
            f"Gamma has little to gain here: {plain}, and with the best gamma, {now.best_gamma:.2f}, it is"
            f" {_percent(now.best_overall)}."
        )
    group = "absent" if now.best_gamma > 0 else "seen"
    return (
        f"Gamma helps: {plain}. With gamma = {now.best_gamma:.2f}, the same weights reach {_percent(now.best_overall)}"
        f" ({_percent(now.best_seen)} and {_percent(now.best_absent)}): the difference was lost only because the logits"
        f" of {group} classes are too low. This gamma was chosen on the validation samples themselves, so take the gain"
        " as an upper bound, for data in which absent classes are as frequent as in these samples."
    )


def _about_levels(evaluated: Sequence[Snapshot]) -> list[str]:
    first, last = (snapshot.levels for snapshot in (evaluated[0], evaluated[-1]))
    if first is None or last is None or len(evaluated) == 1:
        return []
    old, new = first.absent, last.absent
    lines = [
        f"On absent samples, the mean logit of the true class went from {old.true:.2f} to {new.true:.2f}, and the"
        f" largest logit of a seen class from {old.other_seen:.2f} to {new.other_seen:.2f}. Gamma has to close this"
        f" gap, on average {new.other_seen - new.true:.2f}."
    ]
    if math.isfinite(old.other_absent) and math.isfinite(new.other_absent):
        lines.append(
            f"The lead of the true class over the largest other absent class, which tells absent classes apart, went"
            f" from {old.true - old.other_absent:.2f} to {new.true - new.other_absent:.2f}."
        )
    return lines


def _about_updates(snapshots: Sequence[Snapshot]) -> list[str]:
    updates = next((each.updates for each in reversed(snapshots) if each.updates is not None), None)
    if updates is None or math.isnan(updates.within_absent):
        return []
    cosine = updates.within_absent
    if cosine > 0.5:
        meaning = "were pushed in much the same direction, which preserves their order, so a single number can undo it"
    else:
        meaning = "were pushed in different directions, which a single number cannot undo"
    return [f"The head's rows of absent classes {meaning} (mean cosine between their updates: {cosine:.2f})."]


def _evaluation(snapshot: Snapshot) -> Evaluation:
    assert snapshot.evaluation is not None
    return snapshot.evaluation


def _counts(snapshot: Snapshot) -> tuple[int, int]:
    assert snapshot.levels is not None  # measured whenever an evaluation is
    return snapshot.levels.seen.num_samples, snapshot.levels.absent.num_samples


def _noise(accuracy: float, num_samples: int) -> float:
    """Return two standard errors of an accuracy (Agresti and Coull), which are not 0 at accuracies of 0 and 1."""
    total = num_samples + 4
    share = (accuracy * num_samples + 2) / total
    return 2 * math.sqrt(share * (1 - share) / total)


def _when(snapshot: Snapshot) -> str:
    return f"step {snapshot.step} ({f'epoch {snapshot.epoch}' if snapshot.step else 'before fine-tuning'})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"
