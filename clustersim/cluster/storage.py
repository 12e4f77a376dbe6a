"""What storage serves: how long a read takes at a given load, and how many a second a crowd of readers gets.

Reads are random: a sample lies on one drive, and requests meet there by chance, so that drives have queues long before
they are full. A drive serves a read in constant time.
"""

from __future__ import annotations

from clustersim.cluster.node import Storage
from clustersim.hardware.queues import Closed, closed_loop, md1_wait_s, mmc_wait_s


def service_s(storage: Storage, read_bytes: float) -> float:
    """Seconds for which one read of `read_bytes` occupies a drive. A disk seeks first, and serves nobody else
    meanwhile; the others overlap the latencies of many reads."""
    sending = read_bytes * storage.drives / storage.read_rate_bytes_per_s
    return sending + storage.read_latency_s if storage.tier == "disk" else sending


def delay_s(storage: Storage) -> float:
    """Seconds that a read takes besides, in which its drive serves others."""
    return 0.0 if storage.tier == "disk" else storage.read_latency_s


def supply_bytes_per_s(storage: Storage, read_bytes: float) -> float:
    """The most that one host reads in requests of `read_bytes`."""
    return storage.drives * read_bytes / service_s(storage, read_bytes)


def response_s(storage: Storage, read_bytes: float, reads_per_s: float) -> float:
    """Mean seconds of a read on a host that gets `reads_per_s` at random times: latency, queue and service.

    Drives that hold the samples are queues of their own, M/D/1 each; what stands before an object store serves any
    sample, M/M/c. Infinite where the host cannot keep up.
    """
    service = service_s(storage, read_bytes)
    if storage.tier == "object":
        wait = mmc_wait_s(reads_per_s, service, storage.drives)
    else:
        wait = md1_wait_s(reads_per_s / storage.drives, service)
    return delay_s(storage) + wait + service


def reading(storage: Storage, hosts: int, readers: int, read_bytes: float, away_s: float) -> Closed:
    """What `readers` that each have one read under way, on `hosts` alike, get together: reads a second, and the mean
    time of one at the drives. `away_s`: the rest of a reader's cycle (network, decoding) besides the latency.

    Mean value analysis with constant service (`closed_loop`). A pool of c servers counts as one of c times the speed
    that is preceded by (c - 1) / c of the service as a delay (Seidmann et al. 1987). O(readers).
    """
    service = service_s(storage, read_bytes)
    away = delay_s(storage) + away_s
    if storage.tier == "object":
        pool = storage.drives
        return closed_loop(readers, away + service * (pool - 1) / pool, service / pool, stations=hosts, variation=0.0)
    return closed_loop(readers, away, service, stations=hosts * storage.drives, variation=0.0)


def samples_per_s(
    storage: Storage,
    *,
    hosts: int,
    ranks: int,
    readers: int,
    sample_bytes: float,
    stored: float,
    decode_s: float,
    away_s: float,
) -> float:
    """What each of `ranks` gets from `hosts`, all of them reading with `readers` threads: samples a second.

    The fraction `stored` of the samples lies on storage, `away_s` from the readers; a thread decodes each sample for
    `decode_s`. Infinite where nothing takes time.
    """
    if stored <= 0.0:
        return readers / decode_s if decode_s > 0.0 else float("inf")
    found = reading(storage, hosts, readers * ranks, sample_bytes, away_s + decode_s / stored)
    return found.throughput_per_s / ranks / stored
