"""What is scraped is what the engine counts; the trainer's report over the wire; log lines of a server."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny_engine import gated_engine, in_thread, tiny_options, tiny_tensors, wait_until

from zerokl.rollout.client import RolloutClient
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.kl import KLReport
from zerokl.rollout.observe.prometheus import MetricsServer, serve_metrics
from zerokl.rollout.observe.series import SERIES, unlisted
from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.server.sockets import EndpointTakenError
from zerokl.rollout.step_plan import Refusal

PARAMS = SamplingParams(n=3, max_tokens=12, ignore_eos=True)
Scraped = dict[str, dict[tuple[tuple[str, str], ...], float]]


def scrape(address: str) -> Scraped:
    """Sample's name -> labels -> value."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    samples: Scraped = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            rows = samples.setdefault(sample.name, {})
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in rows, "a sample comes twice"
            rows[labels] = sample.value
    return samples


def value(samples: Scraped, name: str, **labels: str) -> float:
    return samples[name][tuple(sorted(labels.items()))]


def total(samples: Scraped, name: str) -> float:
    return sum(samples[name].values())


def test_a_scrape_has_the_engines_numbers(tiny_model: Any) -> None:
    with (
        RolloutEngine(tiny_options(tiny_model, max_num_seqs=4)) as engine,
        serve_metrics(engine, "127.0.0.1:0") as server,
    ):
        num_samples = 0
        for version in range(1, 13):
            engine.generate(["a", "hello"], PARAMS)
            num_samples += 6
            engine.update_weights(tiny_tensors(version % 3))
        engine.pin_weights()
        with pytest.raises(ValueError, match="version must be 13"):
            engine.update_weights(tiny_tensors(0), version=99)
        samples, metrics = scrape(server.address), engine.metrics()
        rank = {"rank": "0", "role": "mixed"}
        assert metrics["generated_tokens"] == 12 * num_samples
        assert value(samples, "zerokl_generated_tokens_total", **rank) == metrics["generated_tokens"]
        assert value(samples, "zerokl_computed_tokens_total", **rank) == metrics["computed_tokens"]
        assert value(samples, "zerokl_kv_free_blocks", **rank) == metrics["free_blocks"]
        assert value(samples, "zerokl_kv_usage_ratio", **rank) == metrics["kv_usage"] == 0
        assert value(samples, "zerokl_steps_total") == metrics["steps"] == value(samples, "zerokl_step_seconds_count")
        assert value(samples, "zerokl_requests_finished_total", reason="length") == num_samples
        assert value(samples, "zerokl_refusals_total", reason="slots") == metrics["refused_slots"] > 0
        assert {labels[0][1] for labels in samples["zerokl_refusals_total"]} == {refusal.value for refusal in Refusal}
        assert value(samples, "zerokl_prefix_cache_hit_tokens_total") == metrics["cached_tokens"]
        # every request once, in each of its histograms
        for name in ("intake", "queue_wait", "time_to_first_token", "request"):
            assert total(samples, f"zerokl_{name}_seconds_count") == num_samples == metrics["received"], name
        assert value(samples, "zerokl_weight_updates_total") == 12 == metrics["weight_updates"]
        assert value(samples, "zerokl_weight_sync_seconds_count", part="stage") == 12
        assert value(samples, "zerokl_weight_sync_seconds_count", part="commit") == 12
        assert value(samples, "zerokl_weight_update_failures_total") == 1
        assert value(samples, "zerokl_weight_version", set="policy") == 12
        assert value(samples, "zerokl_engine_state", state="running") == 1 == total(samples, "zerokl_engine_state")
        versions = {labels[0][1]: count for labels, count in samples["zerokl_version_generated_tokens_total"].items()}
        assert list(versions) == [*map(str, range(4, 12)), "older"], "the newest 8 of 12 and the rest"
        assert sum(versions.values()) == metrics["generated_tokens"] and versions["older"] == 4 * 6 * 12
        buckets = [count for labels, count in samples["zerokl_step_seconds_bucket"].items()]
        assert buckets == sorted(buckets) and buckets[-1] == metrics["steps"]
        assert value(samples, "zerokl_step_seconds_sum") == pytest.approx(metrics["step_seconds"])


def test_every_number_of_an_engine_and_a_server_has_a_series(client: RolloutClient) -> None:
    """Whoever adds a number to `metrics()` adds it to `zerokl.rollout.observe.series`."""
    seen = client.telemetry()
    assert [labels for labels, _ in unlisted(seen)] == []
    assert [labels for labels, _ in unlisted({**seen, "metrics": {**seen["metrics"], "new": 1}})] == [("new",)]


def test_faults_of_ranks_are_exported_where_the_engine_counts_them(client: RolloutClient) -> None:
    seen = client.telemetry()
    counted = {"rank_restarts": 2, "rank_deaths": 1, "rank_stalls": 1, "rank_restart_seconds": 0.5}
    with_faults = {**seen, "metrics": {**seen["metrics"], **counted}}
    found = {series.name: list(series.read(with_faults)) for series in SERIES}
    assert found["zerokl_rank_restarts"] == [((), 2)]
    assert found["zerokl_rank_faults"] == [(("death",), 1), (("stall",), 1), (("step_timeout",), 0)]
    assert not unlisted(with_faults)


def test_label_sets_do_not_grow_with_traffic(client: RolloutClient) -> None:
    with serve_metrics(client, "127.0.0.1:0") as server:
        client.generate("a", PARAMS)
        client.update_weights(tiny_tensors(1))
        before = {name: set(rows) for name, rows in scrape(server.address).items()}
        for index in range(5):
            client.generate(f"prompt {index}", PARAMS, request_ids=[f"id-{index}"])
        after = {name: set(rows) for name, rows in scrape(server.address).items()}
    versions = after.pop("zerokl_version_generated_tokens_total") - before.pop("zerokl_version_generated_tokens_total")
    assert versions == {(("version", "1"),)} and after == before


def test_running_and_waiting_are_seen_in_flight(tiny_model: Any) -> None:
    engine, worker = gated_engine(tiny_model, max_num_seqs=2)
    with engine, serve_metrics(engine, "127.0.0.1:0") as server:
        call = in_thread(lambda: engine.generate(["a", "b", "c"], SamplingParams(max_tokens=4, ignore_eos=True)))
        worker.began.acquire()
        wait_until(lambda: engine.health()["num_running"] == 2)
        samples = scrape(server.address)
        assert value(samples, "zerokl_running_requests", rank="0", role="mixed") == 2
        assert value(samples, "zerokl_waiting_requests") == 1
        assert 0 < value(samples, "zerokl_kv_usage_ratio", rank="0", role="mixed") < 1
        assert value(samples, "zerokl_queue_wait_seconds_count", reason="none") == 2
        worker.open()
        call()
        assert value(scrape(server.address), "zerokl_queue_wait_seconds_count", reason="slots") == 1


def test_metrics_are_for_this_machine_unless_told(client: RolloutClient) -> None:
    for bind in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"):
        with pytest.raises(ValueError, match="reachable from other machines"):
            MetricsServer(bind)
    for bind in ("9400", "", "127.0.0.1", "127.0.0.1:x", ":9400"):
        with pytest.raises(ValueError, match="must be ADDRESS:PORT"):
            MetricsServer(bind)
    with MetricsServer("0.0.0.0:0", allow_remote=True) as server:
        server.start(client.telemetry)
        assert "zerokl_steps_total" in scrape(server.address.replace("0.0.0.0", "127.0.0.1"))
        with pytest.raises(EndpointTakenError, match="is taken"):
            MetricsServer(server.address, allow_remote=True)
    with pytest.raises(ValueError, match="cannot be bound"):
        MetricsServer("192.0.2.1:0", allow_remote=True)


# -- the trainer's report over the wire -------------------------------------------------------------------------------
def test_a_report_over_the_wire_alarms_by_one_bit(client: RolloutClient) -> None:
    rollouts = client.generate(["a", "hello"], PARAMS)
    alarmed: list[KLReport] = []
    client.on_k3_alarm(alarmed.append)
    exact = client.report_trainer_logprobs(rollouts, [one.policy_logprobs for one in rollouts])
    assert (exact.num_tokens, str(exact.k3_kl_mean), alarmed) == (72, "0.0", [])
    off = np.concatenate([one.policy_logprobs for one in rollouts])
    off[7] = np.nextafter(off[7], np.float32(0))
    report = client.report_trainer_logprobs(rollouts, off, version=0)
    assert report.differing_logprobs == 1 and alarmed == [report] and isinstance(report, KLReport)
    with serve_metrics(client, "127.0.0.1:0") as server:
        samples = scrape(server.address)
    assert value(samples, "zerokl_mismatch_alarms_total") == 1 == value(samples, "zerokl_mismatch_alarming")
    assert value(samples, "zerokl_mismatch_k3_kl_mean", tokens="exact") == report.k3_kl_mean > 0
    assert value(samples, "zerokl_mismatch_differing_logprobs_total", tokens="exact") == 1
    assert value(samples, "zerokl_mismatch_tokens_total", tokens="exact") == 144
    assert value(samples, "zerokl_mismatch_alarm_threshold") == 0
    with pytest.raises(ValueError, match=r"logprobs must have shape \(72,\)"):
        client.report_trainer_logprobs(rollouts, off[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer_logprobs": np.zeros(3, np.float32)}, "trainer_logprobs must have an entry for each of the 2 tokens"),
        ({"inexact": np.zeros(1, np.uint8)}, "inexact must have an entry"),
        ({"trainer_logprobs": np.array([0, np.nan], np.float32)}, "trainer_logprobs must be finite, got nan"),
        ({"rollout_logprobs": np.array([0, np.inf], np.float32)}, "rollout_logprobs must be finite"),
        ({"trainer_logprobs": np.zeros((2, 1), np.float32)}, "must be float32 of 1 dimensions"),
        ({"policy_versions": np.zeros(2, np.int32)}, "must be int64 of 1 dimensions"),
        ({"rollout_logprobs": np.zeros(0, np.float32)}, "must hold at least one token"),
    ],
)
def test_a_hostile_report_is_refused(client: RolloutClient, changes: Mapping[str, Any], message: str) -> None:
    from zerokl.rollout.client_calls import PendingCall

    arrays: dict[str, Any] = {
        "trainer_logprobs": np.zeros(2, np.float32),
        "rollout_logprobs": np.zeros(2, np.float32),
        "policy_versions": np.zeros(2, np.int64),
        "inexact": np.zeros(2, np.uint8),
    }
    with pytest.raises((ValueError, ProtocolError), match=message):
        client._wait(PendingCall("report_trainer_logprobs", {}, arrays | changes))
    assert client.telemetry()["mismatch"]["reports"] == 0


def test_telemetry_is_plain_data(client: RolloutClient) -> None:
    client.generate("a", PARAMS)
    seen = client.telemetry()
    assert json.loads(json.dumps(seen)) == seen
    assert seen["metrics"]["server_clients"] == 1 and seen["health"]["ranks"][0]["role"] == "mixed"
