"""The scenario that `clustersim init` starts a user with."""

from __future__ import annotations

import os

from clustersim import files
from clustersim.app.machine import LOCAL

_TEXT = """\
# yaml-language-server: $schema=scenario.schema.json
#
# Which way of keeping {ranks} copies of a small GPT equal is fastest on this machine ({cores})?
# {profile}
#
#   clustersim plan {{this file}}         which layout, and why
#   clustersim run NAME.plan.json       train with it for real
#   clustersim compare NAME.plan.json NAME.run.json
schema_version: 1
name: first

# A preset (tiny-1m, tiny-4m, tiny-10m, tiny-25m are small enough for a CPU), the path of a Hugging Face config.json, or
# dimensions: {{layers: 4, hidden: 256, heads: 4, vocab: 256}}.
model: tiny-4m

# A batch of {batch} sequences of 128 tokens each step. Quantities carry their unit everywhere: 400Gb/s, 80GiB, 5us.
training: {{global_batch: {batch}, sequence: 128, precision: fp32, optimizer: adam}}

# What the software costs on this machine; measured by `clustersim profile`.
framework: clustersim-{name}

cluster:
  # {ranks} ranks share this machine's cores; every rank counts as a device.
  nodes: {{{name}: {{count: 1, devices: {ranks}}}}}

# What the executor runs on CPUs today: data parallelism, by allreduce or by parameter servers beside the workers.
search: {{sync: [allreduce, parameter-server]}}
layout: {{tp: 1, pp: 1, algorithm: ring, recompute: none}}

# The fastest step wins.
objective: step_time

# Questions to ask besides; each is planned again with some keys set.
what_if:
  - {{name: twice the batch, set: {{training.global_batch: {twice}}}}}
"""


def starter_scenario() -> str:
    """A commented scenario for this machine: its cores, and its profile if it has one. Loads no torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = max(2, min(4, cores))
    known = LOCAL in files.profile_names("nodes")
    profile = (
        f"It is profiled already, as {LOCAL!r}; `clustersim profile` measures it anew."
        if known
        else "First let clustersim measure it, once: clustersim profile (--quick: two minutes at most)."
    )
    return _TEXT.format(
        ranks=ranks, cores=f"{cores} {'core' if cores == 1 else 'cores'}", profile=profile, name=LOCAL,
        batch=8 * ranks, twice=16 * ranks,
    )  # fmt: skip
