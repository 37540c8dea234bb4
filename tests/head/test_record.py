import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_calibft.head import attach, set_gamma
from lightning_calibft.head.record import record_logits

from .models import GAMMA, NUM_CLASSES, SEEN, SHIFT, Convolutional, Distilled, Plain, inputs


@pytest.mark.parametrize("model_class", [Plain, Convolutional, Distilled])
def test_the_raw_logits_of_each_forward_are_recorded(model_class):
    model = model_class().eval()
    batches = [inputs(4), inputs(2)]
    raw = [model(x) for x in batches]
    set_gamma(model, GAMMA, SEEN)
    with record_logits(model) as recorded:
        calibrated = [model(x) for x in batches]
    torch.testing.assert_close(recorded, raw)
    torch.testing.assert_close(calibrated, [logits + SHIFT for logits in raw])
    model(batches[0])
    assert len(recorded) == 2
    assert not any(logits.requires_grad for logits in recorded)


def test_training_mode_is_recorded_too():
    model = set_gamma(Plain(), GAMMA, SEEN)
    with record_logits(model) as recorded:
        logits = model(inputs())
    torch.testing.assert_close(recorded, [logits.detach()])


def test_positions_stay_apart_with_the_class_axis_last():
    head = attach(nn.Conv2d(3, NUM_CLASSES, 1))
    with record_logits(head) as recorded:
        logits = head(torch.randn(2, 3, 4, 6))
    torch.testing.assert_close(recorded, [logits.detach().permute(0, 2, 3, 1)])


def test_what_happens_to_the_logits_later_does_not_reach_the_record():
    model = attach(Plain())
    with torch.no_grad(), record_logits(model) as recorded:
        logits = model(inputs())
        expected = logits.clone()
        logits.zero_()
    torch.testing.assert_close(recorded, [expected])


@pytest.mark.parametrize("model_class", [Plain, Distilled])
def test_the_list_can_be_emptied_between_batches(model_class):
    model = attach(model_class())
    with record_logits(model) as recorded:
        for n in (2, 3):
            model(inputs(n))
            assert [len(logits) for logits in recorded] == [n]
            recorded.clear()


def test_an_aborted_forward_does_not_spoil_the_next():
    model, x = attach(Distilled()).eval(), inputs()

    def fail(*_):
        raise KeyboardInterrupt

    with record_logits(model) as recorded:
        handle = model.head_dist.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
        expected = model(x)
    torch.testing.assert_close(recorded[-1], expected.detach())


def test_an_exception_ends_the_recording():
    model = attach(Plain())

    def record_and_fail():
        with record_logits(model) as recorded:
            records.append(recorded)
            raise KeyboardInterrupt

    records = []
    with pytest.raises(KeyboardInterrupt):
        record_and_fail()
    model(inputs())
    assert records == [[]]


def test_recordings_nest():
    model = attach(Plain())
    with record_logits(model) as outer:
        model(inputs(2))
        with record_logits(model) as inner:
            model(inputs(3))
        model(inputs(4))
    assert [len(logits) for logits in outer] == [2, 4]
    assert [len(logits) for logits in inner] == [3]


def test_one_recording_serves_many_blocks_and_nests_in_itself():
    model = attach(Plain()).eval()
    recording = record_logits(model)
    for number in (2, 3):
        with recording as recorded:
            model(inputs(number))
            with recording as inner:
                model(inputs(1))
            model(inputs(5))
        assert [len(logits) for logits in recorded] == [number, 5]
        assert [len(logits) for logits in inner] == [1]
        assert not model.fc.absent_class_calibration.recording
        model(inputs(7))
    assert len(recorded) == 2


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_recorded(copy_of):
    model = attach(Plain())
    before = list(model.state_dict())
    with record_logits(model) as recorded:
        assert list(model.state_dict()) == before
        copied = copy_of(model)
        copied(inputs())
    copied(inputs())
    assert recorded == []


def test_recording_a_compiled_model_does_not_compile_for_each_batch():
    model, x = attach(Plain()).eval(), inputs()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    expected = compiled(x)
    counts = []
    for _ in range(3):
        with record_logits(compiled) as recorded:
            torch.testing.assert_close([compiled(x), compiled(x)], [expected, expected])
        torch.testing.assert_close(recorded, [expected.detach(), expected.detach()])
        compiled(x)
        counts.append(len(graphs))
    assert counts[0] == counts[-1]
