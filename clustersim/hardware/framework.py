"""A framework: what the software does with the hardware."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, ClassVar, Literal

from clustersim.hardware.kernel import GradientDtype
from clustersim.hardware.provenance import Provenance
from clustersim.units import FILE, Bytes, Fraction, Positive, Seconds

Accumulation = Literal["fused", "added", "copied"]
Selective = Literal["core", "alternate-products"]
Unsharding = Literal["in-place", "flat", "split", "autocast"]
StepGradients = Literal["as they are", "fp32", "flat fp32"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCost:
    """CPU time the framework spends to drive the device; a step takes the larger of it and the device's time.

    `per_collective` is spent before every collective, pipeline send, push and pull begins, and for every collective
    inside a pass. `blocking_launches`: every kernel is waited for before the next one is launched (the environment's
    CUDA_LAUNCH_BLOCKING=1), so that a pass takes the sum of both times.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    per_layer_forward_s: Seconds
    per_layer_backward_s: Seconds
    per_micro_batch_s: Seconds
    per_step_s: Seconds
    per_collective_s: Seconds = 0.0
    blocking_launches: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What runs beside what, and how much it slows down the other (1 = not at all).

    `tensor_parallel`: the part of the gathers and scatters of sequence parallelism that runs in pieces beside the GEMMs
    which consume or produce them.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    gradient_reduce: bool
    parameter_gather: bool
    pipeline_send: bool
    tensor_parallel: Fraction = 0.0
    compute_slowdown: Positive = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Factors on what is priced, by its kind, besides those on all kernels and all messages: 1 unless calibrated.

    `memory`: kernels that memory traffic rules (normalisation, activation, softmax, dropout, optimizer, ...);
    `misaligned`: products whose rows break the tensor cores' alignment; `attention`: fused attention kernels;
    `tensor_parallel`: collectives of tensor-parallel groups;
    `synchronisation`: collectives of gradients and weights; `send`: sends between pipeline stages.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    memory: Positive = 1.0
    misaligned: Positive = 1.0
    attention: Positive = 1.0
    tensor_parallel: Positive = 1.0
    synchronisation: Positive = 1.0
    send: Positive = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What the software holds in device memory besides weights, gradients, optimizer state and kept activations.

    `fp32_shards`: sharded weights are kept in fp32 and are the master copy themselves; layers run on gathered 16-bit
    copies (FSDP). `step_gradients`: 16-bit gradients that the optimizer steps on as they are; as an fp32 copy
    (Megatron-LM); or, where ranks shard them, as an fp32 copy of a flat 16-bit copy (DeepSpeed).
    `stage_outputs`: a pipeline stage keeps its output of every micro-batch in flight (DeepSpeed), not only its layers'
    inputs. `eager_loss`: the cross-entropy is torch's, which holds fp32 log-probabilities and the gradients of both
    these and the logits; else one whose gradient takes the place of its softmax. `reduce_buffer`: a copy of gradients
    on their way to be reduced, in ranks that shard them. `communicator`: buffers of each group of ranks that the rank
    communicates in. `fp8_inputs`: linear layers in fp8 keep their inputs in fp8 (Transformer Engine).
    """

    __pydantic_config__: ClassVar[Any] = FILE
    fp32_shards: bool = False
    step_gradients: StepGradients = "as they are"
    stage_outputs: bool = False
    eager_loss: bool = False
    reduce_buffer_bytes: Bytes = 0.0
    communicator_bytes: Bytes = 0.0
    fp8_inputs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """A framework profile, `hwprofiles/frameworks/<name>.yaml`.

    `gradient_accumulation`: how the gradients of several micro-batches are summed: in the weight gradient's GEMM
    (fused), by a kernel that adds them (added), or through a cleared copy in the compute type (copied: DeepSpeed with
    bf16).
    `in_place_loss`: cross-entropy is one kernel on 16-bit logits, whose gradient replaces them; `loss_in_steps`: a
    kernel for each step on fp32 logits, in place (Megatron-LM's vocab_parallel_cross_entropy); `loss_metrics`:
    how many further cross-entropies of the logits a training step reports. `fused_optimizer`: one kernel for all of a
    step's operations, else one for each. `clips_gradients`: their norm is taken and they are scaled. `unsharding`: what
    gathered weights and their gradients are copied through (`sharding_kernels`). `selective`: what selective
    recomputation runs again: attention without its projections, or every second product and what is between them
    (torchtitan). `vocab_multiple`: a multiple of it is a tensor-parallel rank's part of the vocabulary padded to, in
    products (Megatron-LM's --make-vocab-size-divisible-by).
    `sharded_reduce`: how stage 1 of a sharded optimizer reduces gradients, each rank its shard, or all of them on every
    rank (DeepSpeed's BF16 optimizer).
    `scatter_gather`: a pipeline send carries 1/tp of the activations from each tensor-parallel rank, gathered after.
    `memory_overhead_bytes`: device context and workspaces; `fragmentation`: what the allocator adds to the tensors it
    holds; `device_memory`: what it holds besides those of the model. `schedules`: the pipeline schedules that it can
    run. `jitter`: how much the compute time of one replica's step varies (standard deviation over mean): a step waits
    for the slowest, unless the cluster's own noise is drawn. `compute_scale` and `network_scale` multiply kernel and
    collective times: 1 unless calibrated; `scales` those of one kind.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    name: str
    attention: Literal["flash", "unfused", "flash-1", "flash-2", "flash-3", "cudnn"]
    fused_elementwise: bool
    gradient_dtype: GradientDtype
    gradient_accumulation: Accumulation
    sharded_reduce: Literal["reduce_scatter", "all_reduce"] = "reduce_scatter"
    in_place_loss: bool = False
    loss_in_steps: bool = False
    loss_metrics: int = 0
    fused_optimizer: bool = True
    clips_gradients: bool = False
    unsharding: Unsharding = "in-place"
    selective: Selective = "core"
    vocab_multiple: int = 1
    host: HostCost
    overlap: Overlap
    scatter_gather: bool
    schedules: tuple[Schedule, ...] = ("1f1b", "interleaved", "gpipe")
    memory_overhead_bytes: Bytes
    fragmentation: Fraction
    device_memory: DeviceMemory = field(default_factory=DeviceMemory)
    compute_scale: Positive = 1.0
    network_scale: Positive = 1.0
    jitter: Fraction = 0.0
    scales: Scales = field(default_factory=Scales)
    provenance: Provenance
    calibrated: dict[str, Provenance] = field(default_factory=dict)

    def slowest_of(self, replicas: int) -> float:
        """How much longer the slowest of some replicas computes than the average one: 1 + jitter * z, where z is the
        mean of the largest of as many standard normal draws (Blom 1958: the quantile at (n - 3/8) / (n + 1/4))."""
        return 1.0 + self.jitter * max(0.0, NormalDist().inv_cdf((replicas - 0.375) / (replicas + 0.25)))

    def collective_scale(self, group: str) -> float:
        """The factor on the time of a collective among the ranks of a kind of group."""
        if group == "tp":
            return self.network_scale * self.scales.tensor_parallel
        return self.network_scale if group in ("cp", "ep") else self.network_scale * self.scales.synchronisation

    @property
    def send_scale(self) -> float:
        """The factor on the time of a send between stages."""
        return self.network_scale * self.scales.send
