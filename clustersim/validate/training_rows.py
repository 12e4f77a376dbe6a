"""Rows of measured training steps as cases: free text of many sources, read into one scenario each.

What a cell says in words (a GPU, a network, a framework) is recognised by patterns, in order; what is not recognised,
or not stated, makes the row no case and says why. Nothing is guessed that changes a prediction without being named
in the defaults of the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from clustersim.cluster.load import load_node
from clustersim.errors import ClustersimError
from clustersim.hardware.load import load_framework
from clustersim.validate.case import Case, MemoryLevel, Unmapped
from clustersim.validate.rows import Missing, Row, first_match
from clustersim.validate.words import (
    DEVICES,
    FRAMEWORKS,
    GRADIENTS,
    NODES,
    PRECISIONS,
    RECOMPUTE,
    SHARDING,
    known,
)  # fmt: skip

# A network as text: so many cards of a rate in Gb/s, and what they are.
_CARDS = re.compile(r"(\d+) ?[x×] ?(\d+(?:\.\d+)?) ?Gb/s", re.IGNORECASE)
_HFIS = re.compile(r"(\d+(?:\.\d+)?) ?Gb/s.*?(\d+) (?:HFI|NIC|card|HCA|port)s? per node", re.IGNORECASE)
_TOTAL = re.compile(r"(\d+(?:\.\d+)?) ?Gb/s ?/ ?node", re.IGNORECASE)
_CARD_LINKS = {
    (100, r"omni|OPA"): "omnipath-100",
    (100, r"EFA"): "efa-100",
    (400, r"EFA"): "efa-400",
    (100, r"RoCE"): "roce-100",
    (200, r"RoCE"): "roce-200",
    (400, r"RoCE|RDMA"): "roce-400",
    (100, r"."): "infiniband-edr100",
    (200, r"."): "infiniband-hdr200",
    (400, r"."): "infiniband-ndr400",
}
# Frameworks whose recipes divide the rest of a layer by sequence wherever they divide its products (Megatron Core's
# `sequence_parallel`, torchtitan's plan of a tensor-parallel layer); the others leave it off.
_SEQUENCE_PARALLEL = ("megatron-core", "nemo", "torchtitan", "torchtitan-compile")
# Lengths that seq_len tells.
_FULL = r"(full|fixed|packed)\b"
_MOST_LAYERS = 10_000
# Devlin et al. (2018): 15 % of the tokens are masked, and predicted.
_MASKED = 0.15
_REQUIRED = ("gpus", "gbs", "hidden", "layers")
# A preset stands for these.
_DIMENSIONS = ("hidden", "layers")
# The columns of what was measured.
TIMES = ("iteration_ms", "sec_per_iter", "tokens_per_s", "tokens_per_s_per_gpu", "samples_per_s", "tflops_per_gpu")
# Every column that is read; what a file has besides is left alone.
COLUMNS = frozenset({
    "id", "quality", "gpu", "node", "gpus", "gpus_per_node", "inter_node", "fabric", "framework", "family", "preset",
    "model", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_hidden", "vocab", "pad_vocab", "dropout",
    "seq_len", "gbs", "mbs", "tp", "pp", "vpp", "dp", "cp", "ep", "sp", "shard", "recompute", "precision", "gradient",
    "attn_impl", "intra_node", "notes", "lengths", "predicted", *TIMES, "tflops_kind", "params_b", "mem_gb", "mem_unit",
    "mem_level", "kept_elsewhere",
})  # fmt: skip


def is_training(columns: tuple[str, ...]) -> bool:
    """Whether a file with these columns holds training steps."""
    return not lacking(columns)


def lacking(columns: Sequence[str]) -> list[str]:
    """The columns that make a file one of training steps, and are not among these."""
    instead = _DIMENSIONS if "preset" in columns else ()
    return [name for name in _REQUIRED if name not in columns and name not in instead]


def training_case(row: Row) -> Case | Unmapped:
    """The case of one row, or why it is none."""
    name = row.text("id") or f"line {row.line}"
    try:
        scenario = _scenario(row, name)
        return Case(
            id=name, line=row.line, scenario=scenario, measured_s=_measured_s(row), memory_bytes=_memory(row),
            quality=row.text("quality") or "", memory_level=_memory_level(row),
            kept_elsewhere=row.text("kept_elsewhere") or "", assumed=_assumed(row, scenario),
        )  # fmt: skip
    except (Missing, ClustersimError) as reason:
        return Unmapped(id=name, line=row.line, reason=str(reason))


def _measured_s(row: Row) -> float:
    """Seconds of a step, as printed or from the throughput."""
    milliseconds, seconds = row.positive("iteration_ms"), row.positive("sec_per_iter")
    tokens = row.required_count("gbs") * row.required_count("seq_len")
    if milliseconds is not None:
        seconds = milliseconds / 1e3
    elif seconds is None:
        rate = row.positive("tokens_per_s")
        each, samples = row.positive("tokens_per_s_per_gpu"), row.positive("samples_per_s")
        if rate is None and each is not None:
            rate = each * row.required_count("gpus")
        if rate is None and samples is not None:
            rate = samples * row.required_count("seq_len")
        seconds = tokens / rate if rate else _from_flops(row)
    if seconds is None:
        raise Missing(f"no time: needs one of {', '.join(TIMES)}")
    return seconds


def _from_flops(row: Row) -> float | None:
    """Seconds from a rate in FLOP/s per GPU, where the row says by which formula its FLOPs are counted."""
    rate, kind = row.positive("tflops_per_gpu"), row.text("tflops_kind") or ""
    if rate is None:
        return None
    samples, sequence = row.required_count("gbs"), row.required_count("seq_len")
    layers, hidden = row.required_count("layers"), row.required_count("hidden")
    counted = re.search(r"(72|96) ?\*? ?B ?\*? ?s ?\*? ?l ?\*? ?h", kind)
    parameters = row.positive("params_b")
    if counted is not None:
        # Narayanan et al., SC'21, equation 3: 96 with recompute, 72 without; the logits are never computed again.
        factor, vocab = int(counted.group(1)), row.required_count("vocab")
        logits = vocab / (factor / 6.0 * layers * hidden)
        flops = factor * samples * sequence * layers * hidden**2 * (1.0 + sequence / (6.0 * hidden) + logits)
    elif re.search(r"\b6 ?\*?N\b", kind) and parameters:
        flops = samples * sequence * (6.0 * parameters * 1e9 + 12.0 * layers * hidden * sequence)
    elif re.search(r"\b8 ?\* ?(seq|tokens)", kind) and parameters:
        flops = 8.0 * samples * sequence * parameters * 1e9
    else:
        raise Missing(f"no time, and tflops_kind = {kind!r} states no formula: 96*B*s*l*h^2(..), 72*.., 6N, 8*seq*..")
    return flops / (rate * 1e12 * row.required_count("gpus"))


def _framework(row: Row) -> str:
    """The framework's profile, where it does what the row says it did."""
    if re.match(r"PyTorch \d", row.required("framework")):
        # A loop of its own: what wraps the model says how gradients are summed.
        found = "torch-fsdp" if known(row, "shard", SHARDING) == "3" else "torch-ddp"
    else:
        found = known(row, "framework", FRAMEWORKS)
    if found == "megatron-lm" and _later(row):
        found = "megatron-core"
    if found == "torchtitan" and re.search(r"torch\.compile", row.text("notes") or ""):
        found = "torchtitan-compile"
    stated = first_match(row.text("attn_impl") or "", {r"unfused|eager|math": "unfused", r"flash|fused|sdpa": "flash"})
    attention = load_framework(found).attention
    if stated is not None and not attention.startswith(stated):
        raise Missing(f"attn_impl = {row.text('attn_impl')!r}, but the profile of {found} runs {attention} attention")
    return found


def _later(row: Row) -> bool:
    """Whether a run of Megatron-LM is one of Megatron Core, on which it was built anew in 2023: it has fp8, or devices
    of 2022 and later."""
    device = first_match(row.text("gpu") or "", DEVICES) or ""
    return device.startswith(("h100", "h200", "b200")) or first_match(row.text("precision") or "", PRECISIONS) == "fp8"


def _memory(row: Row) -> float | None:
    found, unit = row.positive("mem_gb"), row.text("mem_unit") or "GB"
    if unit not in ("GB", "GiB"):
        raise Missing(f"mem_unit = {unit!r} is neither GB nor GiB")
    return None if found is None else found * (1e9 if unit == "GB" else 2**30)


def _memory_level(row: Row) -> MemoryLevel:
    match row.text("mem_level") or "used":
        case ("allocated" | "reserved" | "used") as level:
            return level
        case other:
            raise Missing(f"mem_level = {other!r} is none of allocated, reserved and used")


def _scenario(row: Row, name: str) -> dict[str, Any]:
    framework = _framework(row)
    precision = known(row, "precision", PRECISIONS)
    training: dict[str, Any] = {
        "global_batch": row.required_count("gbs"), "sequence": row.required_count("seq_len"), "precision": precision,
    }  # fmt: skip
    lengths = row.text("lengths")
    if lengths is not None and not re.match(_FULL, lengths, re.IGNORECASE):
        raise Missing(f"sequences of different lengths ({lengths}), whose mean is not stated")
    predicted = row.positive("predicted")
    if predicted is None and _encoder(row):
        predicted = _MASKED
    if predicted is not None:
        training["predicted"] = predicted
    return {
        "schema_version": 1,
        "name": re.sub(r"[^A-Za-z0-9.-]+", "-", name),
        "model": _model(row),
        "training": training,
        "framework": framework,
        "cluster": {"nodes": _nodes(row), "fabric": row.text("fabric") or "rail-optimized"},
        "layout": _layout(row, framework),
    }


def _encoder(row: Row) -> bool:
    """Whether a row trains a masked language model: its sequences are sentences, seldom packed to one length."""
    return any("bert" in (row.text(name) or "").lower() for name in ("family", "preset"))


def _assumed(row: Row, scenario: dict[str, Any]) -> tuple[str, ...]:
    """What the row leaves open though sources differ in it, and how it was read."""
    found = []
    named = first_match(row.text("framework") or "", FRAMEWORKS)
    if (named, scenario["framework"]) == ("megatron-lm", "megatron-core"):
        found.append("Megatron-LM here is Megatron Core, as since 2023 (column framework)")
    layout = scenario["layout"]
    if layout["tp"] > 1 and row.text("sp") is None:
        word = "on" if layout["sequence_parallel"] else "off"
        found.append(f"sequence parallelism is {word}, as runs of {scenario['framework']} mostly have it (column sp)")
    if not _encoder(row):
        return tuple(found)
    if row.text("lengths") is None:
        found.append(
            "every sequence is as long as seq_len, though runs that leave padding out take much less time (column "
            "lengths; write full where seq_len tells it)"
        )
    if row.number("predicted") is None:
        found.append(f"{_MASKED * 100:.0f} % of the tokens are predicted (column predicted)")
    return tuple(found)


def _model(row: Row) -> dict[str, Any] | str:
    preset = row.text("preset")
    if preset is not None:
        return preset
    family = (row.text("family") or "gpt").lower()
    if "bert" in family:
        if re.match("bert-large", row.text("model") or ""):
            return "bert-large"
        raise Missing("an encoder's dimensions do not describe it; name a preset in a column preset")
    hidden, heads = row.required_count("hidden"), row.required_count("heads")
    if hidden % heads and row.count("head_dim") is None:
        raise Missing(f"hidden = {hidden} is no multiple of heads = {heads}; state head_dim")
    layers = row.required_count("layers")
    if layers > _MOST_LAYERS:
        raise Missing(f"layers = {layers}: no model has so many; write at most {_MOST_LAYERS}")
    model: dict[str, Any] = {
        "layers": layers, "hidden": hidden, "heads": heads, "vocab": row.required_count("vocab"),
        "pad_vocab": row.yes("pad_vocab", otherwise=True),
    }  # fmt: skip
    for column in ("kv_heads", "head_dim", "ffn_hidden"):
        found = row.count(column)
        if found is not None:
            model[column] = found
    if "llama" in family:
        model |= {"gated": True, "norm": "rmsnorm", "bias": False, "rotary": True, "tied": False}
    elif "mpt" not in family:
        model["dropout"] = row.yes("dropout", otherwise="bloom" not in family)
    return model


def _nodes(row: Row) -> dict[str, Any]:
    gpus = row.required_count("gpus")
    named = row.text("node")
    device = known(row, "gpu", DEVICES) if named is None else None
    profile = named or NODES[device or ""]
    inside = row.text("intra_node") or ""
    if re.search("PCIe", inside, re.IGNORECASE) and "pcie" not in profile and "NVLink" not in inside:
        raise Missing(f"intra_node = {inside!r}, but the devices of {profile} are joined by NVLink; name a node")
    per_node = row.count("gpus_per_node") or 8
    per_node = min(per_node, gpus)
    if gpus % per_node:
        raise Missing(f"gpus = {gpus} does not fill nodes of {per_node}")
    count = gpus // per_node
    spec: dict[str, Any] = {"count": count}
    if per_node != 8 or named is not None:
        spec["devices"] = per_node
    if count > 1 and named is None:
        spec["nic"] = cards_of(row.required("inter_node"), per_node)
    elif per_node < 8:
        spec["nic"] = {"count": per_node}
    if device is not None and device != load_node(profile).device:
        spec["device"] = device
    return {profile: spec}


def cards_of(text: str, per_node: int = 8) -> dict[str, Any]:
    """The cards of a node, `count` of a profile `link`, from words like 8x200Gb/s InfiniBand; Missing where unknown."""
    cards, total, several = _CARDS.search(text), _TOTAL.search(text), _HFIS.search(text)
    if cards is not None:
        each = per_node if re.search(r"per GPU", text, re.IGNORECASE) else 1
        count, rate = int(cards.group(1)) * each, float(cards.group(2))
    elif several is not None:
        count, rate = int(several.group(2)), float(several.group(1))
    elif total is not None:
        count, rate = 8, float(total.group(1)) / 8
    else:
        raise Missing(f"inter_node = {text!r} names no cards; write e.g. 8x200Gb/s InfiniBand")
    for (speed, pattern), link in _CARD_LINKS.items():
        if speed == rate and re.search(pattern, text, re.IGNORECASE):
            return {"count": count, "link": link}
    known_rates = ", ".join(str(speed) for speed in sorted({speed for speed, _ in _CARD_LINKS}))
    raise Missing(f"inter_node = {text!r}: no link profile of {rate:g} Gb/s; known are {known_rates}")


def _layout(row: Row, framework: str) -> dict[str, Any]:
    tp, pp = row.required_count("tp"), row.required_count("pp")
    virtual = row.count("vpp") or 1
    recompute = known(row, "recompute", RECOMPUTE)
    layout: dict[str, Any] = {
        "tp": tp, "pp": pp, "micro_batch": row.required_count("mbs"), "virtual_stages": virtual,
        "schedule": "interleaved" if virtual > 1 else "1f1b", "recompute": recompute, "order": "tp-dp-pp",
        "sequence_parallel": _sequence_parallel(row, framework, tp),
    }  # fmt: skip
    if pp > 1:
        # What the frameworks of these rows do unless told otherwise; a balanced split is clustersim's own proposal.
        layout["boundaries"] = "even"
    layout |= _degrees(row, tp, pp)
    gradient = row.text("gradient") or first_match(row.text("precision") or "", GRADIENTS)
    if gradient is not None:
        layout["gradient"] = gradient
    stage = int(known(row, "shard", SHARDING))
    replicas = row.required_count("gpus") // (tp * pp)
    _plain_sharding(row, replicas)
    if replicas == 1 or stage == 0:
        layout |= {"sync": "allreduce", "algorithm": "ring"}
    else:
        layout |= {"sync": "sharded", "sharded_stage": stage}
    return layout


def _degrees(row: Row, tp: int, pp: int) -> dict[str, int]:
    """The other degrees: cp and ep that are not stated are 1, dp is what the GPUs leave. Missing where the product of
    all is not the number of GPUs."""
    gpus = row.required_count("gpus")
    cp, ep = (1 if row.text(name) is None else row.required_count(name) for name in ("cp", "ep"))
    dp = gpus // (tp * pp * cp) if row.text("dp") is None else row.required_count("dp")
    if dp * cp * tp * pp != gpus:
        unsaid = "; cp that is not stated is 1" if row.text("cp") is None else ""
        stated = f" * dp {dp} = {dp * cp * tp * pp}" if row.text("dp") is not None else f" = {cp * tp * pp}"
        wrong = "is not" if row.text("dp") is not None else "is no multiple of"
        raise Missing(f"gpus = {gpus} {wrong} tp {tp} * pp {pp} * cp {cp}{stated}{unsaid}")
    return {"dp": dp, "cp": cp, "ep": ep}


def _plain_sharding(row: Row, replicas: int) -> None:
    """Missing where a row shards in a way that its layout cannot say."""
    text = row.text("shard") or ""
    degree = re.search(r"degree (\d+)|FSDP=(\d+)", text)
    if degree is not None and int(degree.group(1) or degree.group(2)) < replicas:
        raise Missing(f"shard = {text!r}: groups smaller than the {replicas} replicas are not read from a row")
    if re.search(r"offload", f"{text} {row.text('notes') or ''}", re.IGNORECASE):
        raise Missing("states are offloaded to the host, which is not modelled")


def _sequence_parallel(row: Row, framework: str, tp: int) -> bool:
    """Whether tensor-parallel ranks divide a layer's memory-bound operations too."""
    return tp > 1 and row.yes("sp", otherwise=framework in _SEQUENCE_PARALLEL)
