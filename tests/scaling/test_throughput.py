import math
from dataclasses import replace

import pytest

from llmrec.exceptions import DataError
from llmrec.scaling.cost import cost_of
from llmrec.scaling.language import LanguageShape
from llmrec.scaling.shape import Shape
from llmrec.scaling.throughput import Probe, seconds, seconds_per_step

TOKENS = 1000.0


def cost_at(depth, width=32):
    return cost_of(Shape("hstu", depth, width, 500, 20))


def probe_of(cost, each, **changes):
    operations = cost.flops_per_token * TOKENS
    found = Probe(
        encoder="hstu",
        depth=cost.shape.depth,
        width=cost.shape.width,
        seconds_per_step=each,
        startup_seconds=12.0,
        tokens_per_step=TOKENS,
        flops_per_step=operations,
        flops_per_second=operations / each,
        peak=1e11,
        mfu=operations / each / 1e11,
        device="here",
        dtype="float32",
        steps=40,
    )
    return replace(found, **changes)


SMALL, LARGE = cost_at(2), cost_at(8, 64)
PROBES = [probe_of(LARGE, 0.4), probe_of(SMALL, 0.1)]


def test_probes_are_met():
    assert seconds_per_step(SMALL, PROBES) == pytest.approx(0.1)
    assert seconds_per_step(LARGE, PROBES) == pytest.approx(0.4)


def test_between_two_the_logarithms_are_a_line():
    middle = cost_at(5, 40)
    share = math.log(middle.flops_per_token / SMALL.flops_per_token) / math.log(
        LARGE.flops_per_token / SMALL.flops_per_token
    )
    assert 0.2 < share < 0.9
    assert seconds_per_step(middle, PROBES) == pytest.approx(0.1 * 4**share)


def test_beyond_them_it_errs_on_the_long_side():
    assert seconds_per_step(cost_at(1, 8), PROBES) == pytest.approx(0.1)
    larger = cost_at(16, 128)
    rate = LARGE.flops_per_token * TOKENS / 0.4
    assert seconds_per_step(larger, PROBES) == pytest.approx(larger.flops_per_token * TOKENS / rate)
    assert seconds_per_step(SMALL, PROBES, 1e6) == pytest.approx(SMALL.flops_per_token * 1e6 / rate)


def test_probes_of_equal_size_count_alike():
    assert seconds_per_step(SMALL, [*PROBES, probe_of(SMALL, 0.4)]) == pytest.approx(0.2)


def test_a_training_is_its_start_and_its_steps():
    assert seconds(SMALL, 50_000, 3, PROBES) == pytest.approx(12 + 150 * 0.1)
    alone = [probe_of(SMALL, 0.1)]
    # Steps of half the events: twice as many, of which each still takes the least that was measured.
    assert seconds(SMALL, 50_000, 3, alone, tokens_per_step=500) == pytest.approx(12 + 300 * 0.1)
    with pytest.raises(DataError, match="are no training"):
        seconds(SMALL, 0, 1, PROBES)


def test_other_encoders_say_nothing():
    llama = probe_of(SMALL, 0.001, encoder="llama")
    assert seconds_per_step(SMALL, [*PROBES, llama]) == pytest.approx(0.1)
    with pytest.raises(DataError, match=r"No probe is of hstu \(there are: llama\), and no speed is assumed"):
        seconds_per_step(SMALL, [llama])
    language = cost_of(LanguageShape("llama", 2, 32, 320, 3, 5))
    with pytest.raises(DataError, match="No probe is of lm:llama"):
        seconds_per_step(language, [llama])
    assert seconds_per_step(language, [replace(llama, encoder="lm:llama")]) > 0


@pytest.mark.parametrize("change", [{"device": "there"}, {"dtype": "bfloat16"}, {"processes": 2}])
def test_several_machines_are_told_apart(change):
    with pytest.raises(DataError, match="several machines"):
        seconds_per_step(SMALL, [PROBES[0], replace(PROBES[1], **change)])


def test_a_probe_is_kept(tmp_path):
    PROBES[0].save(tmp_path / "probe.json")
    assert Probe.load(tmp_path / "probe.json") == PROBES[0]


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '{"encoder": "hstu"}', "null"], ids=["empty", "list", "none", "part", "null"]
)
def test_a_file_that_is_no_probe(tmp_path, text):
    (tmp_path / "probe.json").write_text(text)
    with pytest.raises(DataError, match="is no probe"):
        Probe.load(tmp_path / "probe.json")


@pytest.mark.parametrize("name", ["seconds_per_step", "flops_per_step", "mfu", "peak"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_measurement_that_is_none(name, value):
    with pytest.raises(DataError, match=f"{name} of a probe is"):
        replace(PROBES[0], **{name: value})
