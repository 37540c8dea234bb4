"""What every metric promises."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from torch import nn

from lightning_calibft import functional as F
from lightning_calibft.functional._inputs import real_dtype
from tests.helpers.references import random_case
from tests.metrics.cases import MEANS, METRICS, make, same, values


def _functional(name, logits, target):
    function = {
        "AUSUC": F.ausuc,
        "SeenUnseenCurve": F.seen_unseen_curve,
        "SplitAccuracy": F.split_accuracy,
        "HarmonicMeanAccuracy": F.harmonic_mean_accuracy,
        "AverageLogitGap": lambda *args, **kwargs: F.average_logit_gap(*args, **kwargs).gamma,
        "NearestClassMeanAccuracy": F.nearest_class_mean_accuracy,
    }[METRICS[name][0].__name__]
    config = dict(METRICS[name][1])
    means = [config.pop("class_means")] if "class_means" in config else []
    return function(logits, target, *means, *random_case(0)[2:], **config)


@pytest.mark.parametrize("sizes", [[60], [1, 30, 0, 29], [7] * 8 + [4]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_function_however_the_data_is_cut(name, batch, sizes, dtype):
    metric = make(name)
    logits, target = batch[0].to(dtype), batch[1]
    for part in zip(logits.split(sizes), target.split(sizes), strict=True):
        metric.update(*part)
    assert same(metric.compute(), _functional(name, logits, target))
    assert all(value.dtype == torch.float64 for value in values(metric.compute()))


def test_forward_gives_the_batch_and_keeps_the_sum(name, batch):
    metric = make(name)
    logits, target = batch
    logits = logits.clone().requires_grad_()
    for part in zip(logits.split(20), target.split(20), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert same(metric(*part), _functional(name, *part))
    assert same(metric.compute(), _functional(name, *batch))
    for state in metric.metric_state.values():
        for tensor in state if isinstance(state, list) else [state]:
            assert not tensor.requires_grad, "the graph of every batch would stay alive"


def test_reset(name, batch):
    metric = make(name)
    metric.update(torch.randn(5, 9) * 9, torch.arange(5))
    metric.compute()
    metric.reset()
    metric.update(*batch)
    assert same(metric.compute(), _functional(name, *batch))


@pytest.mark.parametrize("copy", [lambda metric: metric.clone(), lambda metric: pickle.loads(pickle.dumps(metric))])
@pytest.mark.parametrize("after", ["update", "compute"])
def test_copies_go_on_by_themselves(name, batch, copy, after):
    metric = make(name)
    metric.update(*(part[:30] for part in batch))
    if after == "compute":
        metric.compute()
    twin = copy(metric)
    twin.update(*(part[30:] for part in batch))
    assert same(twin.compute(), _functional(name, *batch))
    assert same(metric.compute(), _functional(name, *(part[:30] for part in batch)))


def test_state_dict_is_empty_and_there_are_no_buffers(name, batch):
    metric = make(name)
    metric.update(*batch)
    assert metric.state_dict() == {}
    assert list(metric.buffers()) == list(metric.parameters()) == []
    nn.ModuleDict({"metric": metric}).load_state_dict({}, strict=True)


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.float(),
        lambda module: module.double(),
        lambda module: module.bfloat16(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
    ],
)
def test_casting_the_enclosing_module_changes_nothing(name, batch, cast):
    metric = make(name)
    metric.update(*(part[:30] for part in batch))
    cast(nn.ModuleList([metric]))
    metric.update(*(part[30:] for part in batch))
    assert same(metric.compute(), _functional(name, *batch))
    metric.reset()
    metric.update(*batch)
    assert same(metric.compute(), _functional(name, *batch))


def test_moving_devices_moves_all_that_update_needs(name):
    metric = make(name).to("meta")
    assert metric.device.type == "meta"
    assert all(value.device.type == "meta" for value in metric._constants.values())


# The nearest mean switches autocast off, which knows no such device.
@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"nearest_mean"}))
def test_an_update_never_waits_for_the_device(name, batch):
    """On the device without values whatever reads one fails, as does copying to the host; code is that of a GPU."""
    metric = make(name, validate_args=False).to("meta")
    metric.update(*(part.to("meta") for part in batch))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        metric.compute()


def test_float64_becomes_float32_only_where_there_is_none():
    assert real_dtype(torch.device("mps")) == torch.float32
    assert real_dtype(torch.device("cuda")) == torch.float64


def test_merge_state(name, batch):
    metric, other = make(name), make(name)
    metric.update(*(part[:30] for part in batch))
    other.update(*(part[30:] for part in batch))
    metric.merge_state(other)
    assert same(metric.compute(), _functional(name, *batch))


def test_state_size(name):
    """At most 8 bytes a sample, beside the hash of the configuration, which any number of samples leaves as it is."""
    metric = make(name)
    for _ in range(3):
        metric.update(torch.randn(1000, 9), torch.randint(9, (1000,)))
    assert metric.configuration.nbytes == 8
    states = [state for key, state in metric.metric_state.items() if key != "configuration"]
    states = [part for state in states for part in (state if isinstance(state, list) else [state])]
    assert sum(t.numel() * t.element_size() for t in states) <= 8 * 3000


def test_state_names_can_be_read(name):
    states = {"configuration", "margin", "code", "correct", "total", "count", "squares"}
    assert make(name).metric_state.keys() <= states


def test_empty_epoch_is_nan(name):
    metric = make(name)
    with pytest.warns(UserWarning, match="received no") as caught:
        result = make(name)(torch.randn(0, 9), torch.zeros(0, dtype=torch.long))
    assert len(caught) == 1
    assert values(result)[0].isnan()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics also warns that update was never called
        assert values(metric.compute())[0].isnan()


def test_ignored_labels(name, batch):
    metric = make(name, ignore_index=-100)
    metric.update(*batch)
    metric.update(torch.randn(3, 9), torch.full((3,), -100))
    assert same(metric.compute(), _functional(name, *batch))


def test_without_validation_unknown_labels_do_not_count(name, batch):
    metric = make(name, validate_args=False)
    metric.update(*batch)
    metric.update(torch.randn(3, 9), torch.tensor([-1, 9, 1000]))
    assert same(metric.compute(), _functional(name, *batch))


def test_bad_batches_are_refused_and_leave_no_trace(name, batch):
    metric = make(name)
    for logits, target, error, message in (
        (batch[0], batch[1].clone().fill_(9), ValueError, r"`target` to hold class ids in \[0, 9\), but got 9"),
        (batch[0], torch.rand(60, 9), TypeError, "Soft and multi-label targets"),
        (batch[0], batch[1][:-1], ValueError, "`target` to have shape"),
        (batch[0].long(), batch[1], TypeError, "to be a floating point tensor"),
        (batch[0][:, :-1], batch[1], ValueError, "to have 9 columns"),
    ):
        with pytest.raises(error, match=message):
            metric.update(logits, target)
    metric.update(*batch)
    assert same(metric.compute(), _functional(name, *batch))


def test_arguments_are_validated(name):
    cls, config = METRICS[name]
    with pytest.raises(ValueError, match="`seen_classes` to hold class ids"):
        cls(9, [0, 9], **config)
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `normalize`"):
        cls(9, [0, 1], normalize=True, **config)
    if "gap" not in name:
        with pytest.raises(ValueError, match="`average` to be one of"):
            cls(9, [0, 1], **{**config, "average": "weighted"})
    if "accuracy" in name:
        with pytest.raises(ValueError, match="`top_k` to be"):
            cls(9, [0, 1], **{**config, "top_k": 10})


def test_class_attributes(name):
    metric = make(name)
    assert metric.full_state_update is False
    assert metric.is_differentiable is False
    assert metric.higher_is_better is (None if name in ("curve", "gap") else True)


def test_plot(name, batch):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    metric = make(name)
    metric.update(*batch)
    figure, ax = metric.plot()
    assert ax.has_data()
    if name != "curve":
        metric.plot([metric.compute(), metric.compute()], ax=ax)
    pyplot.close(figure)


def test_means_are_copied(batch):
    metric = make("nearest_mean")
    assert torch.equal(metric.class_means, MEANS)
    assert metric.class_means.data_ptr() != MEANS.data_ptr()
