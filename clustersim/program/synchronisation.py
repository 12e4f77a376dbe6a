"""Gradient synchronisation: what leaves each stage behind its backward passes, and the step that waits for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, assert_never

from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.layout import AllReduce, ParameterServer, Sharded, node_peers
from clustersim.program.draft import Draft
from clustersim.program.program import Bucket, Collective, Exchange, Gate, Position, Ref, Update, Work
from clustersim.timeline import OpId, OpKind
from clustersim.workload.layer_kernels import optimizer_kernels
from clustersim.workload.model import vocab_per_rank
from clustersim.workload.training import STATE_TENSORS


@dataclass(slots=True)
class Synchronisation:
    """Appends to a draft what the layout's scheme sends, and what its optimizer does.

    `experts`: the bucket of the experts of the same layers, by the number of a bucket of dense parameters. It goes
    where that goes, right behind it, over the ranks that hold the same experts.
    """

    draft: Draft
    devices_per_node: int
    experts: dict[int, Bucket]
    pushes: dict[int, list[Ref]] = field(default_factory=dict)

    @property
    def overlaps(self) -> bool:
        """Reductions run beside the backward pass, bucket by bucket."""
        scheme = self.draft.layout.scheme
        able = self.draft.framework.overlap.gradient_reduce
        return able and (isinstance(scheme, ParameterServer) or scheme.overlap)

    @property
    def every_micro_batch(self) -> bool:
        """Gradients are reduced after every micro-batch, not only after the last."""
        scheme = self.draft.layout.scheme
        return isinstance(scheme, Sharded) and scheme.shards_gradients

    @property
    def gathers_weights(self) -> bool:
        """Weights are gathered before every pass."""
        scheme = self.draft.layout.scheme
        return isinstance(scheme, Sharded) and scheme.shards_weights

    @property
    def reducing_peers(self) -> int:
        """Ranks of a node that sum their gradients before one of them pushes (1: none)."""
        layout = self.draft.layout
        if not layout.sync[0].reduce_in_node:
            return 1
        return node_peers(layout.mesh, layout.order, self.devices_per_node)

    # ----------------------------------------------------------------------------------------------- weights

    def gather_first(self, stage: int, mine: list[Bucket]) -> dict[int, Ref]:
        """Weights sharded by the optimizer are gathered beside the first forward pass, where the framework can."""
        scheme = self.draft.layout.scheme
        shared_out = isinstance(scheme, Sharded) and not scheme.shards_weights
        if not shared_out or not self.draft.framework.overlap.parameter_gather:
            return {}
        found: dict[int, Ref] = {}
        for bucket in sorted(mine, key=lambda b: (b.stage, -b.index)):
            op = OpId(0, -1, bucket.stage, "forward", f"B{bucket.index}", "all-gather")
            found[bucket.index] = self._gather(stage, op, bucket, ())
        return found

    def gather_forward(self, stage: int, i: int, bucket: Bucket, after: tuple[Ref, ...]) -> Ref:
        """The weights of a bucket, before its forward pass of micro-batch `i`."""
        op = OpId(0, i, bucket.stage, "forward", f"B{bucket.index}", "all-gather")
        return self._gather(stage, op, bucket, after)

    def gather_back(self, stage: int, i: int, bucket: Bucket, after: tuple[Ref, ...]) -> Ref:
        """The weights of a bucket once more, before its backward pass of micro-batch `i`."""
        op = OpId(0, i, bucket.stage, "backward", f"B{bucket.index}", "all-gather")
        return self._gather(stage, op, bucket, after)

    def _gather(self, stage: int, op: OpId, bucket: Bucket, after: tuple[Ref, ...]) -> Ref:
        """The last of the gathers, which one stream runs one after the other."""
        dtype = self.draft.layout.precision.compute
        for part in self._parts(bucket):
            named = op._replace(part=f"B{part.index}")
            found = self.draft.collective(stage, named, "all_gather", part, dtype, after)
        return found

    def _parts(self, bucket: Bucket) -> list[Bucket]:
        """A bucket and that of its experts, as far as several ranks hold the same."""
        beside = self.experts.get(bucket.index)
        if beside is None or self.draft.layout.mesh.expert_replicas == 1:
            return [bucket]
        return [bucket, beside]

    # --------------------------------------------------------------------------------------------- gradients

    def send(self, stage: int, i: int, bucket: Bucket, after: tuple[Ref, ...]) -> list[Ref]:
        """Send the gradients of one bucket off, and those of its experts; the refs are what the optimizer waits for."""
        return [ref for part in self._parts(bucket) for ref in self._send(stage, i, part, after)]

    def _send(self, stage: int, i: int, bucket: Bucket, after: tuple[Ref, ...]) -> list[Ref]:
        layout = self.draft.layout
        scheme, gradient = layout.scheme, layout.precision.gradient
        match scheme:
            case AllReduce():
                if layout.mesh.replicas == 1:
                    return list(after[:1])
                kind: Literal["all_reduce", "reduce_scatter"] = "all_reduce"
            case Sharded():
                kind = "reduce_scatter" if scheme.shards_gradients else self.draft.framework.sharded_reduce
            case ParameterServer():
                return self._exchange(stage, scheme, bucket, after)
            case _:
                assert_never(scheme)
        micro_batch = i if self.every_micro_batch else -1
        named: OpKind = "all-reduce" if kind == "all_reduce" else "reduce-scatter"
        op = OpId(0, micro_batch, bucket.stage, "synchronise", f"B{bucket.index}", named)
        return [self.draft.collective(stage, op, kind, bucket, gradient, after)]

    def _exchange(self, stage: int, scheme: ParameterServer, bucket: Bucket, after: tuple[Ref, ...]) -> list[Ref]:
        """Push a bucket, pull it back; ranks of one node first sum among themselves, and each carries its part."""
        layout = self.draft.layout
        peers = self.reducing_peers
        whole = bucket.elements * BYTES_OF[layout.precision.gradient]
        part = f"B{bucket.index}"
        if peers > 1:
            inner = self.draft.append(
                stage,
                Collective(
                    id=OpId(0, -1, bucket.stage, "synchronise", part, "reduce-scatter"), stream="collective",
                    after=after, kind="reduce_scatter", group="node-dp", algorithm="ring", bytes=whole,
                ),
            )  # fmt: skip
            after = (inner,)
        push = self.draft.append(
            stage,
            Exchange(
                id=OpId(0, -1, bucket.stage, "synchronise", part, "push"),
                stream="push", after=after, direction="push", bytes=-(-whole // peers),
                partitions=_partitions(scheme, whole // peers),
            ),
        )  # fmt: skip
        self.pushes.setdefault(bucket.index, []).append(push)
        weights = scheme.optimizer_at == "server"
        back = bucket.elements * BYTES_OF[layout.precision.compute] if weights else whole
        server = layout.mesh.pp
        pull = self.draft.append(
            stage,
            Exchange(
                id=OpId(0, -1, bucket.stage, "synchronise", part, "pull"),
                stream="pull", after=((server, bucket.index),), direction="pull", bytes=-(-back // peers),
                partitions=_partitions(scheme, whole // peers),
            ),
        )  # fmt: skip
        if peers == 1:
            return [pull]
        gathered = self.draft.append(
            stage,
            Collective(
                id=OpId(0, -1, bucket.stage, "synchronise", part, "all-gather"), stream="gather",
                after=(pull,), kind="all_gather", group="node-dp", algorithm="ring", bytes=back,
            ),
        )  # fmt: skip
        return [gathered]

    # ---------------------------------------------------------------------------------------------- the step

    def finish(self, stage: int, mine: list[Bucket], synced: list[Ref]) -> None:
        """Tied embeddings, the optimizer, the gathering of updated shards, the gate."""
        draft, layout, scheme = self.draft, self.draft.layout, self.draft.layout.scheme
        model, training = draft.workload.model, draft.workload.training
        if model.tied and layout.ends[0] != layout.ends[1] and stage in layout.ends:
            size = vocab_per_rank(model.vocab, layout.mesh.tp, padded=False) * model.hidden
            ref = draft.append(
                stage,
                Collective(
                    id=OpId(0, -1, -1, "synchronise", "embedding", "all-reduce"), stream="collective",
                    after=tuple(synced), kind="all_reduce", group="embedding", algorithm="ring",
                    bytes=size * BYTES_OF[layout.precision.gradient],
                ),
            )  # fmt: skip
            synced = [*synced, ref]
        updated: tuple[Ref, ...] = tuple(synced)
        if not (isinstance(scheme, ParameterServer) and scheme.optimizer_at == "server"):
            mesh = layout.mesh
            dense = sum(bucket.elements for bucket in mine)
            experts = sum(self.experts[bucket.index].elements for bucket in mine if bucket.index in self.experts)
            if isinstance(scheme, Sharded):
                dense, experts = -(-dense // mesh.replicas), -(-experts // mesh.expert_replicas)
            shard = dense + experts
            software = draft.framework
            kernels = optimizer_kernels(
                shard, layout.precision.compute, training.optimizer, None, software.fused_optimizer,
                software.clips_gradients,
            )  # fmt: skip
            work = Work(kernels=kernels, inner=(), forward_layers=0, backward_layers=0)
            op = OpId(0, -1, stage, "update", "all", "compute")
            updated = (draft.compute(stage, op, draft.index(work), tuple(synced)),)
        unsharded = isinstance(scheme, Sharded) and not scheme.shards_weights
        if unsharded and not draft.framework.overlap.parameter_gather:
            for bucket in reversed(mine):
                op = OpId(0, -1, bucket.stage, "update", f"B{bucket.index}", "all-gather")
                self._gather(stage, op, bucket, updated)
        if isinstance(scheme, ParameterServer):
            gate = OpId(0, -1, stage, "synchronise", "all", "gate")
            draft.append(stage, Gate(id=gate, after=updated, staleness=0))

    def servers(self, scheme: ParameterServer, all_buckets: tuple[Bucket, ...]) -> Position:
        """What every server does: an update a bucket."""
        layout = self.draft.layout
        element_bytes = BYTES_OF[layout.precision.gradient]
        peers = self.reducing_peers
        state = 0
        if scheme.optimizer_at == "server":
            width = BYTES_OF[layout.precision.optimizer]
            tensors = 1 + STATE_TENSORS[self.draft.workload.training.optimizer]
            state = 2 * width * tensors + element_bytes + BYTES_OF[layout.precision.compute]
        ops = tuple(
            Update(
                id=OpId(0, -1, -1, "update", f"B{bucket.index}", "update"),
                after=tuple(self.pushes[bucket.index]),
                pushes=layout.mesh.replicas // peers,
                bytes=bucket.elements * element_bytes * layout.mesh.tp,
                state_bytes=bucket.elements * layout.mesh.tp * state,
                partitions=_partitions(scheme, bucket.elements * element_bytes // peers),
            )
            for bucket in all_buckets
        )
        return Position(role="server", stage=-1, ops=ops)


def _partitions(scheme: ParameterServer, size: int) -> int:
    return max(1, math.ceil(size / scheme.partition_bytes))
