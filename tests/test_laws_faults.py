"""Laws P20 to P22 of docs/laws.md, and what failures, spares, copies and planned stops cost over days."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import all_reduce, cluster_of, layout_of, parameter_server, servers, wire, workers, workload_of
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.app.door import run
from clustersim.cluster.cluster import Cluster
from clustersim.cluster.reliability import Checkpoints, Hazard, Planned, Reliability, load_failures
from clustersim.errors import InputError, ScenarioError
from clustersim.horizon.checkpoints import (
    best_interval_s,
    daly_interval_s,
    efficiency,
    expected_ettr,
    job_mtbf_s,
    young_interval_s,
)
from clustersim.horizon.failures import Failure, Failures
from clustersim.horizon.horizon import KINDS, Horizon, Ledger, horizon, process, stretches
from clustersim.horizon.job import Job, Recovery, Threat, fewer_replicas, job_of
from clustersim.layout.layout import Layout, Mesh
from clustersim.scenario.load import question
from clustersim.workload.parameters import parameter_count

HOUR, DAY = 3600.0, 86400.0
# The golden case: 419 failures in 54 days, a write of half a minute.
MU, WRITE, RESTART = 3.093 * HOUR, 30.0, 600.0


def threat(
    mtbf_s: float, count: int = 16, *, recovery: Recovery = "rollback", hold_s: float = 0.0, **changes: Any
) -> Threat:
    """`count` nodes of which one fails every `mtbf_s`."""
    given: dict[str, Any] = {"component": "node", "failures": 1.0, "exposure_s": mtbf_s * max(1, count), **changes}
    copy = given.pop("takes_copy", False)
    return Threat(hazard=Hazard(**given), count=count, recovery=recovery, hold_s=hold_s, takes_copy=copy)


def job(*threats: Threat, **changes: Any) -> Job:
    plain = Job(
        nodes=16, devices_per_node=8, servers=0, threats=threats or (threat(MU),), checkpoint_bytes=1e12,
        pause_s=WRITE, persist_s=0.0, load_s=100.0, interval_s=daly_interval_s(WRITE, MU), detection_s=200.0,
        reschedule_s=300.0, repair_s=None, spares=0, elastic=False, planned_every_s=None, planned_lasts_s=0.0,
        server_replicas=0, step_s=1.0, speed=lambda nodes: nodes / 16.0,
    )  # fmt: skip
    return replace(plain, **changes)


def total(found: Horizon) -> float:
    return sum(found.seconds_by_kind.values())


# ------------------------------------------------------------------------------------------------------ closed forms


def test_p22_golden_intervals() -> None:
    assert young_interval_s(WRITE, MU) == pytest.approx(817.4, abs=0.05)
    assert daly_interval_s(WRITE, MU) == pytest.approx(797.5, abs=0.05)
    assert best_interval_s(WRITE, MU) == pytest.approx(797.5, abs=0.05)
    assert efficiency(797.5, WRITE, RESTART, MU) == pytest.approx(0.87966, abs=2e-5)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-3, 1e5), st.floats(1.0, 1e7), st.floats(0.0, 1e4))
def test_p22_the_best_interval_is_the_argmax(write: float, mtbf: float, restart: float) -> None:
    """Nothing on a fine grid around it is better, whatever a restart takes, and Daly's value is as good to 0.2 %."""
    if restart + write > 100.0 * mtbf:
        return
    best = best_interval_s(write, mtbf)
    top = efficiency(best, write, restart, mtbf)
    for factor in np.concatenate([np.linspace(0.5, 1.5, 101), [0.01, 0.1, 10.0]]):
        assert efficiency(best * float(factor), write, restart, mtbf) <= top * (1.0 + 1e-12)
    if write < 0.5 * mtbf:
        assert efficiency(daly_interval_s(write, mtbf), write, restart, mtbf) >= top * (1.0 - 2e-3)


def test_small_writes_young_daly_and_the_optimum_agree() -> None:
    for write in (1e-3, 1e-1, 1.0):
        best = best_interval_s(write, MU)
        assert young_interval_s(write, MU) == pytest.approx(best, rel=2.0 * math.sqrt(write / MU))
        assert daly_interval_s(write, MU) == pytest.approx(best, rel=write / MU)
    assert best_interval_s(0.0, MU) == 0.0
    assert daly_interval_s(3.0 * MU, MU) == MU


def test_efficiency_without_failures_is_the_share_of_training() -> None:
    assert efficiency(570.0, 30.0, 600.0, math.inf) == 0.95
    assert efficiency(570.0, 30.0, 600.0, 1e12) == pytest.approx(0.95, rel=1e-8)


def test_published_rates() -> None:
    """MTTF of jobs at the rates of RSC-1 (Kokolis et al.), and of Llama 3 405B."""
    (rsc1,) = load_failures("rsc-1").hazards
    assert job_mtbf_s(16_384 / 8, rsc1.rate_per_s) / HOUR == pytest.approx(1.80, abs=0.005)
    assert job_mtbf_s(131_072 / 8, rsc1.rate_per_s) / HOUR == pytest.approx(0.225, abs=0.0005)
    (rsc2,) = load_failures("rsc-2").hazards
    assert rsc2.rate_per_s * 1000.0 * DAY == pytest.approx(2.34)
    llama = load_failures("llama-3-405b").hazards
    assert sum(hazard.failures for hazard in llama) == 419.0
    per_node = sum(h.rate_per_s * (8 if h.component == "device" else 1) for h in llama)
    assert per_node * 1000.0 * DAY == pytest.approx(3.79, abs=0.005)
    assert job_mtbf_s(2048, per_node) / HOUR == pytest.approx(3.093, abs=0.0005)


# -------------------------------------------------------------------------------------------------------- P20, P21


@settings(max_examples=50, deadline=None)
@given(st.floats(10.0, 1e5), st.floats(0.0, 100.0), st.floats(0.0, 1000.0), st.floats(0.01, 30.0))
def test_p20_without_failures_all_but_checkpoints_is_useful(
    tau: float, pause: float, persist: float, days: float
) -> None:
    alone = job(threat(MU, count=0), interval_s=tau, pause_s=pause, persist_s=persist)
    whole = days * DAY
    cycles, rest = divmod(whole, tau + pause)
    written = cycles * pause + max(0.0, rest - tau)
    for found in (horizon(alone, days=days, seeds=1), horizon(replace(alone, repair_s=DAY), days=days, seeds=1)):
        assert found.seconds_by_kind["checkpoint"] == pytest.approx(written, rel=1e-9, abs=1e-6)
        assert found.seconds_by_kind["useful"] == pytest.approx(whole - written, rel=1e-12)
        assert total(found) == pytest.approx(whole, rel=1e-12)
        assert found.failures.mean == 0.0


def test_p21_mean_efficiency_is_the_exact_formula() -> None:
    """Ten thousand runs of 54 days: to 0.02 %, where 1 % is asked."""
    found = horizon(job(), days=54.0, seeds=10_000)
    exact = efficiency(job().interval_s, WRITE, RESTART, MU)
    assert exact == pytest.approx(0.87968, abs=1e-5)
    assert found.goodput.mean == pytest.approx(exact, rel=5e-4)
    assert found.failures.mean == pytest.approx(54.0 * DAY / MU, rel=0.002)
    assert found.goodput.low < found.goodput.median < found.goodput.high


@pytest.mark.parametrize(
    ("tau", "pause", "persist", "restart", "mtbf"),
    [(300.0, 60.0, 0.0, 900.0, HOUR), (600.0, 2.0, 400.0, 300.0, HOUR), (900.0, 5.0, 1500.0, 60.0, 2 * HOUR)],
)
def test_p21_with_frequent_failures_and_late_checkpoints(
    tau: float, pause: float, persist: float, restart: float, mtbf: float
) -> None:
    """Half of the time lost; a checkpoint that is safe later costs what as much more restart would."""
    one = job(
        threat(mtbf),
        interval_s=tau,
        pause_s=pause,
        persist_s=persist,
        detection_s=restart,
        reschedule_s=0.0,
        load_s=0.0,
    )
    found = horizon(one, days=100.0, seeds=300)
    assert found.goodput.mean == pytest.approx(efficiency(tau, pause, restart + persist, mtbf), rel=0.01)


def test_expected_ettr_is_near_where_failures_are_rare() -> None:
    for mtbf, tolerance in ((HOUR * 8, 0.05), (HOUR * 48, 0.005)):
        tau = young_interval_s(60.0, mtbf)
        one = job(threat(mtbf), interval_s=tau, pause_s=60.0)
        found = horizon(one, days=200.0, seeds=50)
        assert found.ettr.mean == pytest.approx(expected_ettr(tau, 60.0, one.restart_s, mtbf), rel=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.2, 50.0), st.floats(20.0, 5000.0), st.floats(0.0, 100.0), st.floats(0.0, 2000.0), st.integers(0, 10**9),
    st.sampled_from([0.7, 1.0, 2.0]),
)  # fmt: skip
def test_the_process_and_the_closed_account_agree(
    mtbf_h: float, tau: float, pause: float, persist: float, seed: int, shape: float
) -> None:
    """The same failures, on SimPy's clock and by arithmetic, second by second."""
    one = job(threat(mtbf_h * HOUR, shape=shape), interval_s=tau, pause_s=pause, persist_s=persist)
    failures = Failures(one, 5.0 * DAY, seed, 0)
    here, there = stretches(one, failures.times, 5.0 * DAY), process(one, failures.listed(), 5.0 * DAY)
    for kind in KINDS:
        assert getattr(here, kind) == pytest.approx(getattr(there, kind), rel=1e-9, abs=1e-5), kind
    assert (here.failures, here.rollbacks) == (there.failures, there.rollbacks)


# ---------------------------------------------------------------------------------------------------------- failures


def test_failures_depend_on_their_own_run_and_hazard_only() -> None:
    one, other = threat(MU), threat(2.0 * MU, cause="network")
    alone = Failures(job(one), 54.0 * DAY, 3, 5).times
    both = Failures(job(other, one), 54.0 * DAY, 3, 5)
    assert both.times[both.threats == 1].tolist() == alone.tolist()
    assert Failures(job(one), 54.0 * DAY, 3, 6).times[0] != alone[0]
    assert (np.diff(both.times) >= 0.0).all()
    # Two hazards of one name fail independently.
    twice = Failures(job(one, one), 54.0 * DAY, 3, 5)
    assert len(np.unique(twice.times)) == len(twice.times)
    shorter = Failures(job(one), 20.0 * DAY, 3, 5).times
    assert alone[: len(shorter)].tolist() == shorter.tolist()


@pytest.mark.parametrize("shape", [0.6, 1.0, 3.0])
def test_weibull_components_fail_at_their_mean_rate_in_the_long_run(shape: float) -> None:
    """Over many lives of each component their mean life is what was given; young ones fail more often below shape 1."""
    many = job(threat(DAY, count=64, shape=shape))
    runs = [Failures(many, 64 * 40.0 * DAY, 0, run).times for run in range(3)]
    assert sum(map(len, runs)) / 3 == pytest.approx(64 * 40.0, rel=0.04)
    early = sum(int((times < 6.4 * DAY).sum()) for times in runs) / 3 / 6.4
    assert (early > 1.3) == (shape < 1.0)
    assert (early < 0.2) == (shape > 1.0)


# ------------------------------------------------------------------------------------ spares, repair, elastic, stops


def run_once(one: Job, *at: tuple[float, int, int], whole: float = 10.0 * DAY) -> Ledger:
    """The ledger of a run with failures at these (seconds, threat, component)."""
    failures = [Failure(at_s=when, threat=which, component=component) for when, which, component in sorted(at)]
    found = process(one, failures, whole)
    assert sum(getattr(found, kind) for kind in KINDS) == pytest.approx(whole, rel=1e-12)
    return found


def test_without_a_spare_the_job_waits_for_the_repair() -> None:
    one = job(interval_s=1000.0, pause_s=0.0, repair_s=DAY)
    found = run_once(one, (10_500.0, 0, 3))
    assert found.lost == pytest.approx(500.0)
    assert found.wait == pytest.approx(DAY - one.detection_s)
    assert found.restart == pytest.approx(one.restart_s)


def test_a_spare_takes_over_and_the_next_failure_waits() -> None:
    one = job(interval_s=1000.0, pause_s=0.0, repair_s=DAY, spares=1)
    assert run_once(one, (10_500.0, 0, 3)).wait == 0.0
    # The second node is lost an hour later: the job waits for the first one to come back.
    found = run_once(one, (10_500.0, 0, 3), (14_100.0, 0, 4))
    assert found.wait == pytest.approx(DAY - HOUR - one.detection_s)
    # A crash of software takes no node.
    software = replace(one, threats=(threat(MU, replace=False),))
    assert run_once(software, (10_500.0, 0, 3), (14_100.0, 0, 4)).wait == 0.0


def test_an_elastic_job_goes_on_with_fewer_and_grows_again() -> None:
    one = job(interval_s=1000.0, pause_s=0.0, repair_s=DAY, elastic=True)
    found = run_once(one, (10_500.0, 0, 3))
    slow = DAY - one.restart_s
    assert found.wait == 0.0
    assert found.degraded == pytest.approx(slow / 16.0)
    assert found.lost == pytest.approx(500.0)
    # Once to shrink, once, without detection and after a checkpoint, to grow.
    assert found.restart == pytest.approx(2.0 * one.restart_s - one.detection_s)
    # A place where no node stands does not fail; others do.
    assert run_once(one, (10_500.0, 0, 3), (20_000.0, 0, 3)).failures == 1
    assert run_once(one, (10_500.0, 0, 3), (20_000.0, 0, 4)).failures == 2
    # Where too few are left to run at all, it waits.
    alone = replace(one, speed=lambda nodes: 0.0)
    assert run_once(alone, (10_500.0, 0, 3)).wait == pytest.approx(DAY - one.detection_s)


def test_elastic_beats_waiting_and_spares_beat_elastic() -> None:
    lasting = job(repair_s=DAY)
    found = [
        horizon(one, days=20.0, seeds=20)
        for one in (
            lasting, replace(lasting, elastic=True), replace(lasting, elastic=True, spares=4),
            replace(lasting, elastic=True, spares=40), job(),
        )
    ]  # fmt: skip
    goodput = [result.goodput.mean for result in found]
    assert goodput[:4] == sorted(goodput[:4])
    assert goodput[3] == pytest.approx(goodput[4], rel=1e-9)
    assert all(total(result) == pytest.approx(20.0 * DAY, rel=1e-12) for result in found)
    assert found[1].ettr.mean > found[1].goodput.mean


def test_a_planned_stop_loses_nothing_but_its_time() -> None:
    one = job(threat(MU, count=0), interval_s=1000.0, planned_every_s=DAY, planned_lasts_s=HOUR)
    found = run_once(one)
    stops = 9
    assert found.lost == 0.0
    assert found.planned == pytest.approx(stops * HOUR)
    assert found.restart == pytest.approx(stops * (one.reschedule_s + one.load_s))


def test_failures_during_restarts_waits_and_stops_add_up() -> None:
    """Whatever interrupts whatever, every second is entered once."""
    one = job(
        threat(HOUR), threat(2 * HOUR, recovery="hold", hold_s=100.0, cause="b"), repair_s=6 * HOUR, spares=1,
        elastic=True, planned_every_s=5 * HOUR, planned_lasts_s=HOUR, persist_s=50.0, detection_s=900.0,
    )  # fmt: skip
    found = horizon(one, days=10.0, seeds=30, seed=5)
    assert total(found) == pytest.approx(10.0 * DAY, rel=1e-12)
    assert all(value >= 0.0 for value in found.seconds_by_kind.values())
    assert found.rollbacks.mean < found.failures.mean
    assert found.goodput.mean > 0.2


# ------------------------------------------------------------------------------------------------- parameter servers


def test_a_copy_of_a_server_saves_the_rollback() -> None:
    held = threat(MU, recovery="hold", hold_s=20.0, component="server", takes_copy=True)
    one = job(held, interval_s=1000.0, pause_s=0.0, server_replicas=1, step_s=7.0)
    found = run_once(one, (10_500.0, 0, 3))
    assert found.rollbacks == 0
    assert found.lost == pytest.approx(500.0 % 7.0)
    assert found.restart == pytest.approx(one.detection_s + 20.0)
    # A second one lost while the first is fetched leaves no copy.
    twice = run_once(one, (10_500.0, 0, 3), (10_600.0, 0, 4))
    assert (twice.failures, twice.rollbacks) == (2, 1)
    assert run_once(replace(one, server_replicas=2), (10_500.0, 0, 3), (10_600.0, 0, 4)).rollbacks == 0


def test_time_between_rollbacks_counts_the_loss_of_the_last_copy() -> None:
    """Two failures of eight servers within one recovery, against many runs."""
    held = threat(4.0 * HOUR, count=8, recovery="hold", hold_s=30.0, component="server", takes_copy=True)
    one = job(held, server_replicas=1, pause_s=1.0, detection_s=60.0)
    assert one.mtbf_s == pytest.approx(16.0 * HOUR * HOUR / 90.0)
    found = horizon(one, days=300.0, seeds=20)
    assert found.rollbacks.mean == pytest.approx(300.0 * DAY / one.mtbf_s, rel=0.2)
    assert job(threat(MU, recovery="hold")).mtbf_s == math.inf


def price(_: Layout) -> float:
    return 2.0


RATE = 5e9


def described(scheme: Any, *, failures: Any = None, hosts: int = 4, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "failures": failures or (
            Hazard(component="node", failures=1.0, exposure_s=1e8),
            Hazard(component="server", failures=1.0, exposure_s=1e8),
        ),
        "detection_s": 600.0, "reschedule_s": 60.0,
        "checkpoint": Checkpoints(storage_rate_bytes_per_s=1e9), **changes,
    }  # fmt: skip
    cluster: Cluster = cluster_of(workers(4, devices=2, far=wire(RATE)), hosts=servers(hosts, far=wire(RATE)))
    layout = layout_of(Mesh(dp=4, tp=2, pp=1), scheme)
    return job_of(Reliability(**given), cluster, workload_of(8), layout, price)


def recoveries(one: Job) -> tuple[str, ...]:
    return tuple(threat.recovery for threat in one.threats)


def test_what_a_lost_worker_or_server_costs_each_scheme() -> None:
    assert recoveries(described(all_reduce())) == ("rollback", "rollback")
    assert [threat.count for threat in described(all_reduce()).threats] == [4, 0]
    # Servers hold everything: workers are replaced, servers are not.
    held = described(parameter_server(4, 0))
    assert recoveries(held) == ("hold", "rollback")
    assert [threat.count for threat in held.threats] == [4, 4]
    copied = described(parameter_server(4, 0), server_replicas=1)
    assert recoveries(copied) == ("hold", "hold")
    # With the optimizer at the workers it is the other way round.
    assert recoveries(described(parameter_server(4, 0, optimizer_at="worker"))) == ("rollback", "hold")
    # A server beside a worker is lost with it.
    beside = described(parameter_server(0, 8), server_replicas=1)
    assert (recoveries(beside)[0], beside.threats[0].takes_copy) == ("hold", True)
    assert recoveries(described(parameter_server(0, 8)))[0] == "rollback"


def test_what_recovery_fetches() -> None:
    size = parameter_count(workload_of(8).model)
    copied = described(parameter_server(4, 0), server_replicas=1)
    assert copied.threats[1].hold_s == pytest.approx(14.0 * size / 4.0 / RATE)
    assert copied.threats[0].hold_s == pytest.approx(60.0 + 2.0 * size / RATE)


def test_checkpoint_times_follow_from_model_and_storage() -> None:
    size = 14.0 * parameter_count(workload_of(8).model)
    one = described(all_reduce())
    assert one.checkpoint_bytes == size
    assert (one.pause_s, one.persist_s, one.load_s) == pytest.approx((size / 1e9, 0.0, size / 1e9))
    assert one.restart_s == pytest.approx(660.0 + size / 1e9)
    # 4 nodes write at most 4 times their rate.
    slow = described(all_reduce(), checkpoint=Checkpoints(storage_rate_bytes_per_s=1e12, node_rate_bytes_per_s=1e8))
    assert slow.pause_s == pytest.approx(size / 4e8)
    usual = described(all_reduce(), checkpoint=Checkpoints(storage_rate_bytes_per_s=1e12))
    assert usual.pause_s == pytest.approx(size / (4 * RATE))
    later = described(all_reduce(), checkpoint=Checkpoints(mode="async", pause_s=0.5, storage_rate_bytes_per_s=1e9))
    assert (later.pause_s, later.persist_s) == pytest.approx((0.5, size / 1e9))
    # Known to the second: no rates needed.
    known = described(all_reduce(), checkpoint=Checkpoints(write_s=33.0, bytes_per_parameter_bytes=12.0))
    assert (known.pause_s, known.load_s, known.checkpoint_bytes) == (33.0, 33.0, size * 12.0 / 14.0)
    assert known.interval_s == pytest.approx(daly_interval_s(33.0, 1e8 / 4))
    assert described(all_reduce(), checkpoint=Checkpoints(write_s=33.0, interval_s=70.0)).interval_s == 70.0


def test_fewer_replicas_run_at_the_simulated_speed() -> None:
    def slower(layout: Layout) -> float:
        return 8.0 / layout.mesh.dp

    hazard = Hazard(component="node", failures=1.0, exposure_s=1e8)
    given = Reliability(
        failures=hazard, detection_s=1.0, reschedule_s=1.0, checkpoint=Checkpoints(write_s=1.0), repair_s=DAY,
        elastic=True,
    )  # fmt: skip
    cluster = cluster_of(workers(8, devices=2))
    # A replica fills two nodes: losing one node loses it whole.
    one = job_of(given, cluster, workload_of(8), layout_of(Mesh(dp=4, tp=2, pp=2), all_reduce()), slower)
    assert [one.speed(nodes) for nodes in range(9)] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0]
    experts = layout_of(Mesh(dp=4, tp=2, pp=2, ep=2), all_reduce())
    assert [job_of(given, cluster, workload_of(8), experts, slower).speed(n) for n in (8, 7, 4, 3)] == [1, 0.5, 0.5, 0]
    assert fewer_replicas(layout_of(Mesh(dp=4, tp=1, pp=1), parameter_server(0, 4)), 3).mesh.dp == 3


# --------------------------------------------------------------------------------------------------------- bad input


def asked(**changes: Any) -> dict[str, Any]:
    block: dict[str, Any] = {
        "failures": "rsc-1", "detection": "5min", "reschedule": "5min", "checkpoint": {"storage_rate": "100GB/s"},
    }  # fmt: skip
    block.update(changes)
    return {
        "schema_version": 1, "name": "faults", "model": "gpt3-125m",
        "training": {"global_batch": 8, "sequence": 128}, "cluster": {"nodes": {"dgx-a100-80g": 1}},
        "reliability": {key: value for key, value in block.items() if value is not None},
    }  # fmt: skip


HAZARD = {"component": "node", "failures": 1, "exposure": "10d"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"failures": "rsc-3"}, "reliability.failures: 'rsc-3' is not a known reliability; did you mean 'rsc-2'?"),
        ({"failures": []}, "failures: names none"),
        ({"failures": [{**HAZARD, "exposure": 3}]}, "bare number 3 has no unit"),
        ({"failures": [{**HAZARD, "exposure": "0d"}]}, "exposure: must be more than 0"),
        ({"failures": [{**HAZARD, "component": "rack"}]}, "'rack' is not one of 'node', 'device', 'server'"),
        ({"detection": None}, "detection: this key is required and missing"),
        ({"checkpoint": {}}, "needs storage_rate"),
        ({"checkpoint": {"write": "3s", "pause": "1s"}}, "pause: belongs to mode: async"),
        ({"checkpoint": {"write": "3s", "load": "3s", "node_rate": "1GB/s"}}, "node_rate: decides nothing"),
        ({"checkpoint": {"write": "3s", "interval": "0s"}}, "interval: must be more than 0"),
        ({"checkpoint": {"write": "3s", "intervall": "3s"}}, "unknown key; did you mean 'interval'?"),
        ({"spares": 2}, "spares: needs repair"),
        ({"elastic": True}, "elastic: needs repair"),
        ({"spares": -2, "repair": "1d"}, "spares: must not be negative"),
        ({"planned": {"every": "1h", "lasts": "2h"}}, "every: must be longer than lasts"),
    ],
)
def test_mistakes_are_told_in_one_line(changes: dict[str, Any], told: str) -> None:
    with pytest.raises((ScenarioError, InputError)) as caught:
        question(asked(**changes), "faults")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_interval_shorter_than_the_write_is_refused() -> None:
    plan = Checkpoints(mode="async", pause_s=1.0, write_s=100.0, interval_s=50.0)
    with pytest.raises(InputError, match=r"interval: 50 s is less than the 99 s"):
        described(all_reduce(), checkpoint=plan)
    assert described(all_reduce(), checkpoint=replace(plan, interval_s=None)).interval_s >= 99.0


def test_profiles_say_where_they_come_from() -> None:
    found = question(asked(failures=["rsc-2", HAZARD]), "faults")
    assert "reliability/rsc-2" in found.digests
    assert found.scenario.reliability is not None
    assert len(list(found.scenario.reliability.hazards())) == 2
    for name in ("rsc-1", "rsc-2", "llama-3-405b"):
        assert "2" in load_failures(name).provenance.source
        assert load_failures(name).name == name


def test_planned_stops_and_elastic_jobs_from_a_scenario() -> None:
    plan = Planned(every_s=DAY, lasts_s=HOUR)
    one = described(all_reduce(), planned=plan, repair_s=DAY, spares=3)
    assert (one.planned_every_s, one.planned_lasts_s, one.spares, one.constant_rate) == (DAY, HOUR, 3, False)
    assert described(all_reduce()).constant_rate
    speed: Callable[[int], float] = one.speed
    assert speed(4) == 1.0


# ----------------------------------------------------------------------------------------------------- the command line

SCENARIO = """
schema_version: 1
name: small
model: gpt3-125m
training: {global_batch: 64, sequence: 1024, tokens: 1e9}
cluster: {nodes: {dgx-a100-80g: 2}}
layout: {tp: 1, pp: 1, sync: allreduce}
search: {simulate: 1}
"""
RELIABILITY = """
reliability: {failures: rsc-1, detection: 5min, reschedule: 5min, checkpoint: {storage_rate: 1GB/s}}
"""


def test_days_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SCENARIO)
    assert run(["simulate", str(path), "--days", "100", "-q"]) == 3
    assert "write a reliability: block" in capsys.readouterr().err
    path.write_text(SCENARIO + RELIABILITY)
    assert run(["simulate", str(path), "--days", "0", "-q"]) == 2
    assert "--days 0: write a number of days" in capsys.readouterr().err
    assert run(["simulate", str(path), "--days", "100", "--seeds", "40", "-q"]) == 0
    shown = capsys.readouterr().out
    assert "100 days on 2 nodes, 40 runs" in shown
    assert all(len(line) <= 100 for line in shown.splitlines())
    answers = []
    for seed in ("0", "0", "1"):
        arguments = ["simulate", str(path), "--days", "100", "--seeds", "40", "--seed", seed, "--json", "-q"]
        assert run(arguments) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] != answers[2]
    assert sum(answers[0]["hours"].values()) == pytest.approx(2400.0)
    assert answers[0]["goodput"]["mean"] == pytest.approx(answers[0]["closed_forms"]["goodput"], rel=0.005)
    assert answers[0]["goodput"]["p5"] <= answers[0]["goodput"]["p50"] <= answers[0]["goodput"]["p95"]
    assert answers[0]["mtbf_s"] == pytest.approx(1000.0 * DAY / 6.5 / 2.0)


def test_steps_under_noise_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SCENARIO)
    assert run(["simulate", str(path), "--seed", "3", "-q"]) == 3
    assert "nothing is random here" in capsys.readouterr().err
    noise = "fabric: one-switch, noise: {worker: {kind: lognormal, sigma: 0.2}}}"
    path.write_text(SCENARIO.replace("2}}", "2}, " + noise))
    assert run(["simulate", str(path), "--steps", "50", "--seed", "7", "-q"]) == 0
    shown = capsys.readouterr().out
    assert all(f"p{name} " in shown for name in (50, 90, 99))
    assert run(["simulate", str(path), "--steps", "50", "--seed", "7", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(set(found["step_times_s"])) == 50
    assert sum(found["step_times_s"]) / 50.0 == pytest.approx(found["step_s"], rel=1e-12)
