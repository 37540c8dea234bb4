from __future__ import annotations

import tempfile

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

# The same examples each time, and no folder in the repository.
set_hypothesis_home_dir(tempfile.gettempdir() + "/hypothesis")
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _warnings_have_tests_of_their_own(recwarn: pytest.WarningsRecorder) -> None:
    """A group without samples is warned about, and so are logits that look like probabilities."""
