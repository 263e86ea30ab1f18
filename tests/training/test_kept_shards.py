"""Shards of what costs a search: shared out, kept, continued, and made again where they are not whole."""

from types import SimpleNamespace

import numpy as np
import pytest

from llmrec.training.kept_shards import KeptShards

ROWS = 11


class Made:
    """What a search finds of each row, and which rows were asked."""

    def __init__(self, stop=None):
        self.asked, self.stop = [], stop

    def __call__(self, begin, end):
        self.asked.append((begin, end))
        if len(self.asked) == self.stop:
            raise KeyboardInterrupt
        rows = np.arange(begin, end)
        return {"twice": np.stack([rows, 2 * rows], axis=1), "half": rows[:, None] / 2}


def shards(folder, made, size=4, rows=ROWS, columns=None):
    return KeptShards(folder, rows, made, columns or {"twice": 2, "half": 1}, size=size)


def check(found):
    np.testing.assert_array_equal(found["twice"], np.stack([np.arange(ROWS), 2 * np.arange(ROWS)], axis=1))
    np.testing.assert_array_equal(found["half"], np.arange(ROWS)[:, None] / 2)


@pytest.mark.parametrize("size", [1, 4, 11, 20])
def test_all_rows_come_back_in_order_and_are_made_once(tmp_path, size):
    made = Made()
    check(shards(tmp_path, made, size).load())
    assert made.asked == [(begin, min(begin + size, ROWS)) for begin in range(0, ROWS, size)]
    check(shards(tmp_path, Made(stop=1), size).load())


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_what_is_missing_and_none_does_what_another_did(tmp_path, processes):
    shards(tmp_path, Made()).search([1])
    makers = [Made() for _ in range(processes)]
    each = [shards(tmp_path, made) for made in makers]
    missing = each[0].missing()
    assert missing == [0, 2]
    for number, one in enumerate(each):
        one.search(missing, number, processes)
    spans = [(0, 4), (8, 11)]
    assert [made.asked for made in makers] == [spans[number::processes] for number in range(processes)]
    assert each[-1].missing() == []
    check(shards(tmp_path, Made(stop=1)).load())


def test_who_was_stopped_goes_on_and_a_torn_file_is_made_again(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        shards(tmp_path, Made(stop=3)).load()
    made = Made()
    check(shards(tmp_path, made).load())
    assert made.asked == [(8, 11)]
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    files[1].write_bytes(b"torn")
    again = Made()
    check(shards(tmp_path, again).load())
    assert again.asked == [(4, 8)]
    assert "is made again" in caplog.text


def test_files_of_other_sizes_or_columns_are_made_again(tmp_path):
    shards(tmp_path, Made()).load()
    made = Made()
    check(shards(tmp_path, made, size=5).load())
    assert made.asked == [(0, 5), (5, 10), (10, 11)]
    other = KeptShards(tmp_path, ROWS, lambda begin, end: {"one": np.ones((end - begin, 3))}, {"one": 3}, size=5)
    assert other.missing() == [0, 1, 2]
    assert other.load()["one"].shape == (ROWS, 3)


def test_no_rows_are_nothing(tmp_path):
    made = Made()
    found = shards(tmp_path / "none", made, rows=0).load()
    assert {name: one.shape for name, one in found.items()} == {"twice": (0, 2), "half": (0, 1)}
    assert made.asked == []
    assert not (tmp_path / "none").exists()


def test_machines_without_a_common_disk_each_make_what_they_lack(tmp_path, monkeypatch):
    """Four processes on two machines: each looks, takes its share of all, and then of what its own disk lacks."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda: SimpleNamespace(wait_for_everyone=lambda: None))

    class Turns(KeptShards):
        """The turns of processes that run side by side, one after the other."""

        def search(self, shards, first=0, step=1, progress=False):
            turns.append((first, step, list(shards)))
            super().search(shards, first, step)

    for machine, own in (("a", [0, 1]), ("b", [2, 3])):
        turns, asked = [], []
        for number in own:
            made = Made()
            training = SimpleNamespace(
                process_index=number, world_size=4, local_process_index=number % 2, disable_tqdm=True
            )
            Turns(tmp_path / machine, ROWS, made, {"twice": 2, "half": 1}, size=2).share_out(training)
            asked += made.asked
        assert [turn[:2] for turn in turns] == [(own[0], 4), (0, 2), (own[1], 4), (1, 2)]
        assert len(asked) == len(set(asked))
    check(shards(tmp_path / "b", Made(), size=2).load())


def test_one_process_makes_all(tmp_path):
    made = Made()
    training = SimpleNamespace(process_index=0, world_size=1, local_process_index=0, disable_tqdm=True)
    kept = shards(tmp_path, made)
    kept.share_out(training)
    assert made.asked == [(0, 4), (4, 8), (8, 11)]
    check(kept.load())
