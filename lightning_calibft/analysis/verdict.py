"""What the numbers of a fit mean, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_calibft._arguments import check_items
from lightning_calibft.analysis.history import Evaluation, Snapshot

GENTLER = "Fine-tune more gently: a smaller learning rate, fewer epochs, or frozen early layers."


def verdict(snapshots: Sequence[Snapshot]) -> list[str]:
    """Say whether gamma helps, whether calibration can help at all, and what the head's weights and logits tell.

    A difference counts if it is larger than two standard errors of an accuracy on that many samples.

    Args:
        snapshots: A fit in order, the first before or early in training.

    Returns:
        Sentences, the most important first.

    Example:
        >>> from lightning_calibft.analysis import Snapshot, verdict
        >>> verdict([Snapshot(epoch=0, step=0)])[0]
        'No validation had labelled samples of both seen and absent classes, so nothing tells whether gamma helps...'
    """
    check_items("snapshots", snapshots, Snapshot)
    evaluated = [each for each in snapshots if each.evaluation is not None]
    if not evaluated:
        return [
            "No validation had labelled samples of both seen and absent classes, so nothing tells whether gamma helps,"
            " or whether the features of absent classes are still good. What follows is about the weights alone.",
            *_about_updates(snapshots),
        ]
    return [
        _about_features(evaluated),
        _about_gamma(evaluated[-1]),
        *_about_levels(evaluated),
        *_about_updates(snapshots),
    ]


def degraded(first: Snapshot, last: Snapshot) -> list[str]:
    """Name what fell between two validations, of that which no gamma changes: ``AUSUC`` and ``Acc_U/U``."""
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
        f" Acc_U/U, the accuracy on absent samples among absent classes alone, from"
        f" {_percent(before.groups.absent_among_absent)} to {_percent(after.groups.absent_among_absent)}. No gamma"
        " changes either."
    )
    if len(evaluated) == 1:
        text = (
            f"Whether fine-tuning has cost the features of absent classes anything cannot be told from one validation"
            f" (AUSUC {after.ausuc:.3f}, Acc_U/U {_percent(after.groups.absent_among_absent)}). {_baseline(first)}"
        )
        return text.strip()
    if fallen := degraded(first, last):
        best = max(evaluated, key=lambda each: _evaluation(each).ausuc)
        return (
            f"CALIBRATION CANNOT HELP with all of this: fine-tuning has degraded the features of absent classes"
            f" ({' and '.join(fallen)} fell). {numbers} Gamma only chooses a point on the seen-unseen curve, and the"
            f" curve itself has sunk. {GENTLER} AUSUC was best, {_evaluation(best).ausuc:.3f}, at {_when(best)}."
        )
    return f"The features of absent classes have held. {numbers} {_baseline(first)}".strip()


def _baseline(first: Snapshot) -> str:
    if first.step == 0:
        return ""
    return (
        f"What was lost before the first validation, at {_when(first)}, does not show: run `trainer.validate` before"
        " `trainer.fit` to begin with the model before fine-tuning."
    )


def _about_gamma(last: Snapshot) -> str:
    now, counts = _evaluation(last), _counts(last)
    plain = f"{_percent(now.overall)} overall ({_percent(now.groups.seen_among_all)} of seen and"
    plain += f" {_percent(now.groups.absent_among_all)} of absent samples)"
    if now.best_overall - now.overall <= _noise(now.overall, sum(counts)):
        return (
            f"Gamma has little to win here: without it {plain} are right, and with the best gamma,"
            f" {now.best_gamma:.2f}, {_percent(now.best_overall)}."
        )
    group = "absent" if now.best_gamma > 0 else "seen"
    return (
        f"Gamma helps: without it {plain} are right. With gamma = {now.best_gamma:.2f} the same weights reach"
        f" {_percent(now.best_overall)} ({_percent(now.best_seen)} and {_percent(now.best_absent)}): so much was lost"
        f" only because the logits of {group} classes are too low. This gamma was chosen on the validation samples"
        " themselves: take it as the most that there is to win, where absent classes are as frequent as in them."
    )


def _about_levels(evaluated: Sequence[Snapshot]) -> list[str]:
    first, last = (snapshot.levels for snapshot in (evaluated[0], evaluated[-1]))
    if first is None or last is None or len(evaluated) == 1:
        return []
    old, new = first.absent, last.absent
    lines = [
        f"On absent samples the logit of the true class went from {old.true:.2f} to {new.true:.2f}, the largest seen"
        f" one from {old.other_seen:.2f} to {new.other_seen:.2f}: gamma has to make up for the second less the first,"
        f" {new.other_seen - new.true:.2f} on average."
    ]
    if math.isfinite(old.other_absent) and math.isfinite(new.other_absent):
        gap = new.true - new.other_absent
        lines.append(
            f"What tells absent classes apart, the true logit less the largest other absent one, went from"
            f" {old.true - old.other_absent:.2f} to {gap:.2f}."
        )
    return lines


def _about_updates(snapshots: Sequence[Snapshot]) -> list[str]:
    updates = next((each.updates for each in reversed(snapshots) if each.updates is not None), None)
    if updates is None or math.isnan(updates.within_absent):
        return []
    cosine = updates.within_absent
    if cosine > 0.5:
        meaning = "were pushed much the same way, which keeps their order among each other: what one number can undo"
    else:
        meaning = "were pushed in different ways, which one number cannot undo"
    return [f"The head's rows of absent classes {meaning} (mean cosine between their updates {cosine:.2f})."]


def _evaluation(snapshot: Snapshot) -> Evaluation:
    assert snapshot.evaluation is not None
    return snapshot.evaluation


def _counts(snapshot: Snapshot) -> tuple[int, int]:
    assert snapshot.levels is not None  # an evaluation comes with them
    return snapshot.levels.seen.num_samples, snapshot.levels.absent.num_samples


def _noise(accuracy: float, num_samples: int) -> float:
    """Two standard errors of an accuracy, after Agresti and Coull: not 0 where all samples or none are right."""
    total = num_samples + 4
    share = (accuracy * num_samples + 2) / total
    return 2 * math.sqrt(share * (1 - share) / total)


def _when(snapshot: Snapshot) -> str:
    return f"step {snapshot.step} ({f'epoch {snapshot.epoch}' if snapshot.step else 'before fine-tuning'})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"
