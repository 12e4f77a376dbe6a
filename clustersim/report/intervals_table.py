"""The recorded intervals as Markdown, for docs/accuracy.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from clustersim.hardware.intervals import Intervals, KernelResiduals
from clustersim.report.figures import percent


def intervals_markdown(found: Intervals) -> str:
    """By kind of case the interval, how many rows and sources it is from; and the coverage of sources left out."""
    lines = [
        f"From {found.provenance.rows} rows ({found.provenance.date}). Measured / predicted lies between:",
        "", "| kind of case | rows | sources | 90 % of the rows | interval |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for residuals in (found.measured, found.roofline):
        for band in residuals.kinds:
            interval = found.interval(band.kind)
            lines.append(
                f"| {', '.join(band.kind)} | {band.rows} | {len(band.sources)} | {band.low:.2f} to {band.high:.2f} | "
                f"{interval.low:.2f} to {interval.high:.2f} |"
            )
    lines += [
        "",
        "Sources left out, one at a time: the share of their rows (and of their pairs of layouts) inside intervals "
        "that were built without them.",
        "", "| source | measured kernels | roofline | pairs, measured |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    one, two = found.measured, found.roofline
    for source in sorted({*one.left_out, *two.left_out}):
        cells = (_cell(shares, source) for shares in (one.left_out, two.left_out, one.ratio_left_out))
        lines.append(f"| {source}{' *' if source in found.learned else ''} | {' | '.join(cells)} |")
    means = (_mean(shares) for shares in (one.left_out, two.left_out, one.ratio_left_out))
    lines += [f"| **mean over sources** | {' | '.join(means)} |", ""]
    if found.learned:
        lines += ["\\* A shipped constant was learned from some of these runs: their errors flatter.", ""]
    lines += _pairs("Kernels measured", one)
    lines += _pairs("By the roofline", two)
    lines.append(f"Runs of one configuration are within ±{percent(found.repeats - 1.0)} of their median (90 %).")
    noisy = ", ".join(f"{source} (±{percent(share)})" for source, share in found.noisy.items())
    lines.append(f"Left out, because their repeats differ by more than 10 %: {noisy}." if noisy else "")
    return "\n".join(lines).rstrip() + "\n"


def _pairs(title: str, found: KernelResiduals) -> Iterator[str]:
    yield (
        f"{title}: two layouts are told apart from ±{percent(found.ratio - 1.0)} on ({found.pairs} pairs in "
        f"{found.groups} groups, {len(found.ratio_sources)} sources)."
    )


def _cell(shares: Mapping[str, float], source: str) -> str:
    return percent(shares[source]) if source in shares else "-"


def _mean(shares: Mapping[str, float]) -> str:
    return percent(math.fsum(shares.values()) / len(shares)) if shares else "-"
