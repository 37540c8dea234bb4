import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_calibft.head import attach, set_gamma
from lightning_calibft.head.record import LogitRecorder, UnexpectedLogitsError, one_forward, record_logits

from .models import GAMMA, NUM_CLASSES, SEEN, Convolutional, Distilled, Plain, inputs

MODELS = [Plain, Convolutional, Distilled]


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "plain"])
@pytest.mark.parametrize("model_class", MODELS)
def test_it_records_between_start_and_stop_only(model_class, attached):
    model = model_class().eval()
    batches = [inputs(4), inputs(2)]
    raw = [model(x) for x in batches]
    if attached:
        set_gamma(model, GAMMA, SEEN)
    recorder = LogitRecorder(model)
    model(batches[0])
    growing = recorder.start()
    for number, x in enumerate(batches):
        model(x)
        assert len(growing) == number + 1
    recorded = recorder.stop()
    model(batches[0])
    torch.testing.assert_close(recorded, raw)
    assert recorded is growing
    assert not any(logits.requires_grad for logits in recorded)
    assert recorder.stop() == []
    recorder.start()
    model(batches[1])
    assert [len(logits) for logits in recorder.stop()] == [2]


def test_a_plain_model_gains_no_key_and_loses_the_hook_again():
    model = Plain()
    before = list(model.state_dict())
    recorder = LogitRecorder(model, "fc")
    recorder.start()
    assert list(model.state_dict()) == before
    recorder.remove()
    assert not model.fc._forward_hooks
    model(inputs())
    assert recorder.stop() == []


def test_gamma_that_is_attached_later_is_not_recorded():
    model = Plain().eval()
    raw = model(inputs())
    recorder = LogitRecorder(model)
    set_gamma(model, GAMMA, SEEN)
    recorder.start()
    model(inputs())
    torch.testing.assert_close(recorder.stop(), [raw])


@pytest.mark.parametrize("order", ["nested", "crossed"])
@pytest.mark.parametrize("attached", [True, False], ids=["attached", "plain"])
def test_two_recorders_record_the_same_batch_independently(order, attached):
    model = Plain().eval()
    first = LogitRecorder(model)
    if attached:
        first.remove()
        first = LogitRecorder(attach(model))
    second = record_logits(attach(model))
    first.start()
    model(inputs(2))
    second.start()
    model(inputs(3))
    stopped = [first, second] if order == "crossed" else [second, first]
    head = stopped[0].stop()
    model(inputs(4))
    lengths = {stopped[0]: [len(logits) for logits in head], stopped[1]: [len(logits) for logits in stopped[1].stop()]}
    model(inputs(5))
    expected = ([2, 3], [3, 4]) if order == "crossed" else ([2, 3, 4], [3])
    assert (lengths[first], lengths[second]) == expected
    assert not model.fc.absent_class_calibration.recording


def test_a_block_pauses_the_recorders_around_it():
    model = attach(Plain())
    around, block, inside = record_logits(model), record_logits(model), record_logits(model)
    around.start()
    with block as recorded:
        model(inputs(5))
        inside.start()
        model(inputs(2))
    model(inputs(3))
    assert [len(logits) for logits in recorded] == [5, 2]
    assert [len(logits) for logits in inside.stop()] == [2, 3]
    assert [len(logits) for logits in around.stop()] == [3]


def test_a_recorder_that_is_stopped_or_started_again_inside_a_block_records_once():
    model = attach(Plain())
    stopped, again = record_logits(model), record_logits(model)
    stopped.start(), again.start()
    with record_logits(model):
        stopped.stop(), again.start()
    model(inputs(3))
    assert stopped.stop() == []
    assert [len(logits) for logits in again.stop()] == [3]
    assert not model.fc.absent_class_calibration.recording


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_plain_model_does_not_record(copy_of):
    model = Plain()
    recorder = LogitRecorder(model)
    recorder.start()
    copied = copy_of(model)
    copied(inputs())
    assert recorder.stop() == []
    (hook,) = copied.fc._forward_hooks.values()
    assert hook.__self__.stop() == []


def test_compiled_code_records_through_a_hook_that_was_there_before():
    model, x = Plain().eval(), inputs()
    recorder = LogitRecorder(model)
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x).detach()
    for _ in range(2):
        recorder.start()
        compiled(x)
        torch.testing.assert_close(recorder.stop(), [expected])
        compiled(x)


def test_a_model_without_a_calibration_has_no_block():
    with pytest.raises(ValueError, match=r"Call `attach\(model\)` first"):
        record_logits(Plain())


def test_the_logits_of_one_forward():
    logits = torch.randn(3, NUM_CLASSES)
    assert one_forward([logits], 3, NUM_CLASSES) is logits
    for one_position in (logits[:, None], logits[None], logits[:, None, None]):
        torch.testing.assert_close(one_forward([one_position], 3, NUM_CLASSES), logits, rtol=0, atol=0)
    for records in (
        [],
        [logits, logits],
        [logits[:2]],
        [logits[:, :2]],
        [torch.stack([logits, logits], 1)],
        [logits.T],
    ):
        shapes = str([tuple(each.shape) for each in records])
        with pytest.raises(UnexpectedLogitsError) as error:
            one_forward(records, 3, NUM_CLASSES, "Do this.")
        assert str(error.value).endswith(f"for a batch of 3 labels, but got {shapes}. Do this.")


def test_the_calibration_survives_scripting_and_a_recorder():
    head = set_gamma(nn.Linear(4, NUM_CLASSES).eval(), GAMMA, SEEN)
    with record_logits(head):
        head(torch.ones(1, 4))
    torch.testing.assert_close(torch.jit.script(head)(torch.ones(1, 4)), head(torch.ones(1, 4)))
