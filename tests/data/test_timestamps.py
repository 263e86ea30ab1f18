import logging
from datetime import UTC, date, datetime, timedelta, timezone

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.data.source import Source
from llmrec.data.timestamps import check_times
from llmrec.data.values import refuse
from llmrec.exceptions import DataError

LOG = Source("log.csv")
NOW = 1_750_000_000.0
REAL = st.integers(631_152_000, 1_750_000_000)
FACTORS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def checked(values, unit="auto"):
    times, faults = check_times(pl.Series(values, strict=False), "ts", LOG, unit, NOW)
    refuse(faults, LOG)
    return times


@settings(deadline=None)
@given(st.lists(REAL, min_size=1), st.sampled_from(sorted(FACTORS)), st.booleans(), st.booleans())
def test_units_are_equal(seconds, unit, given_unit, as_text):
    raw = [second * FACTORS[unit] for second in seconds]
    times = checked([str(value) for value in raw] if as_text else raw, unit if given_unit else "auto")
    assert times.unit == unit
    assert times.seconds.dtype == pl.Int64
    assert times.seconds.to_list() == seconds
    assert times.order.to_list() == raw


@settings(deadline=None)
@given(st.lists(st.tuples(REAL, st.sampled_from([0, 1, 500_000, 123_456])), min_size=1), st.integers(-14, 14))
def test_dates_of_every_form_are_equal(moments, hours):
    utc = [datetime.fromtimestamp(second, UTC) + timedelta(microseconds=micro) for second, micro in moments]
    expected = [second + micro / 1e6 for second, micro in moments]
    zone = timezone(timedelta(hours=hours))
    columns = [
        [moment.replace(tzinfo=None) for moment in utc],
        utc,
        [moment.replace(tzinfo=None).isoformat() for moment in utc],
        [moment.isoformat(" ") for moment in utc],
        [moment.isoformat().replace("+00:00", "Z") for moment in utc],
        [moment.astimezone(zone).isoformat() for moment in utc],
        [moment.astimezone(zone).strftime("%Y-%m-%dT%H:%M:%S.%f%z") for moment in utc],
    ]
    for column in columns:
        times = checked(column)
        assert times.unit == "iso"
        assert times.seconds.to_list() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.dates(date(1990, 1, 1), date(2025, 6, 1)), min_size=1))
def test_days_of_every_form_are_equal(days):
    expected = [int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) for day in days]
    whole = [int(day.strftime("%Y%m%d")) for day in days]
    for column in (days, [day.isoformat() for day in days], whole, [str(number) for number in whole]):
        times = checked(column)
        assert (times.unit, times.seconds.to_list()) == ("iso", expected)


def test_nanoseconds_are_ordered_where_seconds_are_equal():
    base = 1_700_000_000 * 10**9
    times = checked([base + 2, base + 1])
    assert times.seconds[0] == times.seconds[1]
    assert times.order.to_list() == [base + 2, base + 1]
    dates = checked(pl.Series([base + 2, base + 1]).cast(pl.Datetime("ns")))
    assert dates.order.to_list() == [base + 2, base + 1]
    assert dates.seconds[0] == dates.seconds[1] == pytest.approx(1_700_000_000)


@pytest.mark.parametrize("zone", ["+05:30", "+0530", "-03:30", "Z", "z"])
@pytest.mark.parametrize("text", ["2014-05-13T12:00:00", "2014-05-13 12:00", "2014-05-13T12:00:00.5"])
def test_zones_of_half_an_hour(zone, text):
    shift = {"+05:30": -19_800, "+0530": -19_800, "-03:30": 12_600}.get(zone, 0)
    seconds = checked([text + zone]).seconds[0]
    assert seconds == 1_399_982_400 + shift + 0.5 * text.endswith(".5")


@pytest.mark.parametrize("values", [[0, 1, 2], [5, 20.5, 10], ["3", "1"], [314_000_000], [1, None]])
def test_numbers_that_are_no_times_are_an_order(values, caplog):
    with caplog.at_level(logging.INFO, logger="llmrec"):
        times = checked(values)
    assert times.unit == "order"
    assert times.seconds.to_list() == [None if value is None else float(value) for value in values]
    assert "'ts' is taken as an order" in caplog.text


def test_what_was_taken_is_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="llmrec"):
        checked([1_400_000_000_000, 1_500_000_000_000])
    assert [record.getMessage() for record in caplog.records] == [
        "log.csv: column 'ts' is taken as milliseconds since 1970, from 2014-05-13 to 2017-07-14"
    ]


T = 1_400_000_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([T, -1, T, -5], r"log\.csv, row 2 of 4: ts is -1, which is negative.*2 such row.*--timestamp-unit.*drop"),
        ([-1, 2], r"row 1 of 2: ts is -1, which is negative"),
        ([T, 0, T], r"row 2 of 3: ts is 0, which is no later than 1970 in s \(1 such"),
        ([T * 1000, T, T * 1000], r"row 2 of 3: .*no later than 1970 in ms, but a time in s: the units are mixed"),
        ([T, T, T * 1000], r"row 3 of 3: .*more than a year from now in s, but a time in ms: the units are mixed"),
        ([T * 10**6, T * 10**6, T * 10**9], r"row 3 of 3: .*but a time in ns: the units are mixed"),
        ([T, 9_999_999_999], r"row 2 of 2: ts is 9999999999, which is more than a year from now in s \(1"),
        ([T, float("inf")], r"row 2 of 2: ts is inf, which is no number"),
        (["2014-05-13", "2014-13-45"], r"row 2 of 2: ts is '2014-13-45', which is no ISO 8601 date"),
        (["2014-05-13", "2014-05-14", "1400000000"], r"row 3 of 3: .*a number among dates: the units are mixed"),
        (["1400000000", "2014-05-13"], r"row 2 of 2: ts is '2014-05-13', which is no number"),
        (["monday"], r"row 1 of 1: ts is 'monday', which is no number"),
        (["2014-05-13", "2999-01-01"], r"row 2 of 2: .*more than a year from now"),
        ([["x"]], r"ts holds List"),
        ([timedelta(1)], r"ts holds Duration"),
        ([2**64 - 1, 1], r"ts is"),
    ],
)
def test_what_is_no_time_is_refused(values, message):
    with pytest.raises(DataError, match=message):
        checked(values)


def test_times_before_1990_are_kept_and_counted(caplog):
    times = checked([T, 400_000_000, 500_000_000, 31_536_000])
    assert times.seconds.to_list() == [T, 400_000_000, 500_000_000, 31_536_000]
    assert "3 row(s) lie before 1990, such as log.csv, row 2 of 4 (ts is 400000000)" in caplog.text


def test_the_ends_of_what_is_allowed():
    latest = int(NOW) + 366 * 86_400
    assert checked([T, latest]).seconds.to_list() == [T, latest]
    with pytest.raises(DataError, match="year from now"):
        checked([T, latest + 1])
    with pytest.raises(DataError, match="1970"):
        checked([T, 31_535_999])


def test_a_given_unit_is_held_to():
    with pytest.raises(DataError, match="more than a year from now in s, but a time in ms"):
        checked([T * 1000], "s")
    with pytest.raises(DataError, match=r"no later than 1970 in ms"):
        checked([T], "ms")
    assert checked([T * 1000, -5, 0], "order").seconds.to_list() == [T * 1000, -5, 0]
    assert checked(["20140513"], "iso").seconds.to_list() == [1_399_939_200]
    with pytest.raises(DataError, match="no ISO 8601"):
        checked(["1400000000"], "iso")
    with pytest.raises(DataError, match="no unit of time 'hours'"):
        checked([1], "hours")
    with pytest.raises(DataError, match="no date"):
        checked([1.5], "iso")


def test_unknown_times_are_no_fault():
    assert checked([T, None, T]).seconds.to_list() == [T, None, T]
    assert checked(["", " ", "2014-05-13"]).seconds.null_count() == 2
    assert checked([None, None]).seconds.null_count() == 2


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(REAL, st.sampled_from(["", "+00", "-08", "+14", " +01", "Z", " Z", " UTC", "+0530"])), min_size=1
    ),
    st.sampled_from(["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y%m%dT%H%M%S", "%Y-%m-%dT%H%M", "%Y-%m-%d %H"]),
    st.sampled_from(["", ",25", ".25"]),
)
def test_short_offsets_and_rare_forms(moments, form, fraction):
    fraction = fraction if form.endswith("%H:%M:%S") else ""
    cut = {"%H": 3600, "%M": 60}.get(form[-2:], 1)
    texts, expected = [], []
    for second, zone in moments:
        sign, hours = zone.strip()[:1], zone.strip()[1:]
        shift = 0
        if sign in ("+", "-"):
            shift = (int(hours[:2]) * 3600 + int(hours[2:] or 0) * 60) * (1 if sign == "+" else -1)
        local = (second + shift) // cut * cut
        texts.append(datetime.fromtimestamp(local, UTC).strftime(form) + fraction + zone)
        expected.append(local - shift + (0.25 if fraction else 0))
    times = checked(texts)
    assert (times.unit, times.seconds.to_list()) == ("iso", expected)


@pytest.mark.parametrize(
    "text",
    [
        "2014-01-01T00-8",
        "2014-01-01T00:00:00+0",
        "2014-01-01T25Z",
        "2014-01",
        "2014-01-01T",
        "2014-01-01T00:00+99",
        "T00",
    ],
)
def test_what_only_looks_like_a_rare_form_is_refused(text):
    with pytest.raises(DataError, match="row 3 of 3"):
        checked(["2014-01-01T00:00:00+00", "2014-01-01", text])
