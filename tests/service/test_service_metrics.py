"""Metrics: bounded labels, one registry or several processes, Prometheus' own parser."""

import json

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route

from llmrec.service.metrics import REASONS, Metrics
from llmrec.service.observer import Observer


def series(metrics):
    """Name and labels of every series, and its value."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_labels_take_no_words_of_requests():
    metrics = Metrics(None, ["main"], ["red"])
    metrics.searched("main", "red")
    before = len(series(metrics))
    for number in range(100):
        metrics.searched("main", f"adapter {number}")
        metrics.swapped(f"catalog {number}", "refused")
        metrics.refused(f"reason {number}")
        metrics.answered("other", f"METHOD{number}", 404, 0.1)
    after = series(metrics)
    assert len(after) - before < 30  # four series and the route's histogram
    assert after["llmrec_searches_total", (("adapter", "other"), ("catalog", "main"))] == 100
    assert after["llmrec_catalog_swaps_total", (("catalog", "other"), ("result", "refused"))] == 100
    assert after["llmrec_refusals_total", (("reason", "other"),)] == 100


def test_a_version_in_use_is_the_only_one_of_its_catalog():
    metrics = Metrics(None, ["main", "other"])
    for catalog, version in (("main", "a"), ("other", "a"), ("main", "b"), ("main", "b"), ("main", "c")):
        metrics.serves(catalog, version)
    found = {labels: value for (name, labels), value in series(metrics).items() if name == "llmrec_catalog_version"}
    assert found == {
        (("catalog", "main"), ("version", "c")): 1.0,
        (("catalog", "other"), ("version", "a")): 1.0,
    }


def test_what_has_not_happened_is_zero_and_not_absent():
    found = series(Metrics())
    assert all(found["llmrec_refusals_total", (("reason", reason),)] == 0 for reason in REASONS)
    assert found["llmrec_beam_rows", (("state", "waiting"),)] == 0
    assert found["llmrec_stage_seconds_count", (("stage", "engine"),)] == 0


def test_stages_that_fail_are_not_counted():
    metrics = Metrics()
    with metrics.stage("engine"):
        pass
    with pytest.raises(ValueError, match="no"), metrics.stage("engine"):
        raise ValueError("no")
    assert series(metrics)["llmrec_stage_seconds_count", (("stage", "engine"),)] == 1


def test_two_servers_have_two_registries_and_one_is_named():
    registry = CollectorRegistry()
    first, second = Metrics(registry), Metrics()
    first.rows(5, 6)
    assert registry.get_sample_value("llmrec_beam_rows", {"state": "running"}) == 5
    assert second.registry.get_sample_value("llmrec_beam_rows", {"state": "running"}) == 0


def test_routes_are_labelled_by_their_template():
    templates = ["/v1/recommend", "/v1/users/{user_id:path}/history", "/v1/users/{user_id:path}"]
    observer = Observer(None, None, lambda: [Route(path, endpoint=lambda: None) for path in templates])
    assert observer._label("/v1/recommend") == "/v1/recommend"
    assert observer._label("/v1/users/a/b/history") == "/v1/users/{user_id:path}/history"
    assert observer._label("/v1/users/ann") == "/v1/users/{user_id:path}"
    assert observer._label("/v1/recommend/x") == "other"


def test_several_processes_are_gathered(run_python, tmp_path):
    """vLLM with several API servers sets PROMETHEUS_MULTIPROC_DIR: values then come from files of all of them."""
    code = """
from llmrec.service.metrics import Metrics
metrics = Metrics(None, ["main"])
metrics.serves("main", "a")
metrics.serves("main", "b")
metrics.rows(3, 4)
metrics.searched("main", None)
metrics.took("engine", 0.2)
metrics.ready(True)
"""
    for _ in range(2):
        assert run_python(code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)).returncode == 0
    gather = """
import json
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
value = registry.get_sample_value
print(json.dumps([value("llmrec_searches_total", {"catalog": "main", "adapter": ""}),
    value("llmrec_stage_seconds_count", {"stage": "engine"}),
    value("llmrec_beam_rows", {"state": "running"}),
    value("llmrec_catalog_version", {"catalog": "main", "version": "a"}),
    value("llmrec_catalog_version", {"catalog": "main", "version": "b"})]))
"""
    done = run_python(gather, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [2.0, 2.0, 6.0, 0.0, 1.0]
