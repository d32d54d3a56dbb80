"""What the rules choose against what a tuner timed."""

import pytest

from benchmarks import rules
from jaxcodec.checkpoints.files import read_json

LAUNCHES = read_json(rules.Options.times)["rows"]


def test_one_choice_a_launch_and_none_faster_than_the_best():
    for launch in LAUNCHES[::20]:
        found = dict(rules.ratios(launch))
        assert min(found.values()) >= 1
        assert "choice" in found


def test_a_choice_without_a_time_is_named():
    launch = LAUNCHES[0] | {"candidates": LAUNCHES[0]["candidates"][-1:]}
    with pytest.raises(ValueError, match="no time of the .*_mosaic chosen now"):
        dict(rules.ratios(launch))
