"""Rows of measured training steps as cases: free text of many sources, read into one scenario each.

What a cell says in words (a GPU, a network, a framework) is recognised by patterns, in order; what is not recognised,
or not stated, makes the row no case and says why. Nothing is guessed that changes a prediction without being named
in the defaults of the file.
"""

from __future__ import annotations

import re
from typing import Any

from clustersim.validate.case import Case, Unmapped
from clustersim.validate.rows import Missing, Row, first_match

# Device profiles by how sources write them.
DEVICES = {
    r"HBM2e|96 ?GB": "",
    r"A100.*80 ?GB": "a100-sxm-80g",
    r"A100.*40 ?GB": "a100-sxm-40g",
    r"H100": "h100-sxm",
    r"H200": "h200-sxm",
    r"\bB200": "b200",
    r"V100.*32 ?GB": "v100-sxm2-32g",
    r"V100.*16 ?GB": "v100-sxm2-16g",
    r"L40S": "l40s",
}
# The node profile that has a device's interconnect, PCIe and host; its network is overridden where a row states one.
NODES = {
    "a100-sxm-80g": "dgx-a100-80g",
    "a100-sxm-40g": "dgx-a100-40g",
    "h100-sxm": "hgx-h100",
    "h200-sxm": "hgx-h200",
    "b200": "hgx-b200",
    "v100-sxm2-32g": "dgx-1-v100",
    "v100-sxm2-16g": "dgx-1-v100",
    "l40s": "pcie-l40s-8",
}
FRAMEWORKS = {
    r"llm-foundry|FSDP|torchtitan|Composer": "torch-fsdp",
    r"NeMo|Megatron-Core|Megatron-Bridge|Megatron-LM core": "megatron-core",
    r"DeepSpeed": "megatron-deepspeed",
    r"Megatron": "megatron-lm",
    r"clustersim": "clustersim",
}
PRECISIONS = {
    r"fp8|float8": "fp8",
    r"bf16|bfloat16": "bf16",
    r"fp16|half|amp|mixed": "fp16",
    r"tf32": "tf32",
    r"fp32|float32|single": "fp32",
}
RECOMPUTE = {r"^full": "full", r"^selective": "selective", r"^none|^no\b|^0$": "none"}
SHARDING = {
    r"zero-?3|FULL_SHARD|^FSDP": "3",
    r"zero-?2|SHARD_GRAD_OP": "2",
    r"zero-?1|distributed optimizer": "1",
    r"^none|DDP|^0$": "0",
}
# A network as text: so many cards of a rate in Gb/s, and what they are.
_CARDS = re.compile(r"(\d+) ?[x×] ?(\d+(?:\.\d+)?) ?Gb/s", re.IGNORECASE)
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
_REQUIRED = ("gpus", "gbs", "hidden", "layers")
# Every column that is read; what a file has besides is left alone.
COLUMNS = frozenset({
    "id", "quality", "gpu", "node", "gpus", "gpus_per_node", "inter_node", "fabric", "framework", "family",
    "preset", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_hidden", "vocab", "dropout", "seq_len",
    "gbs", "mbs", "tp", "pp", "vpp", "dp", "cp", "ep", "sp", "shard", "recompute", "precision", "gradient",
    "iteration_ms", "sec_per_iter", "tokens_per_s", "tokens_per_s_per_gpu", "samples_per_s", "mem_gb",
})  # fmt: skip


def is_training(columns: tuple[str, ...]) -> bool:
    """Whether a file with these columns holds training steps."""
    return all(name in columns for name in _REQUIRED)


def training_case(row: Row) -> Case | Unmapped:
    """The case of one row, or why it is none."""
    name = row.text("id") or f"line {row.line}"
    try:
        scenario = _scenario(row, name)
        return Case(
            id=name, line=row.line, scenario=scenario, measured_s=_measured_s(row), memory_bytes=_memory(row),
            quality=row.text("quality") or "",
        )  # fmt: skip
    except Missing as reason:
        return Unmapped(id=name, line=row.line, reason=str(reason))


def _measured_s(row: Row) -> float:
    """Seconds of a step, as printed or from the throughput."""
    milliseconds, seconds = row.number("iteration_ms"), row.number("sec_per_iter")
    tokens = row.required_count("gbs") * row.required_count("seq_len")
    if milliseconds is not None:
        seconds = milliseconds / 1e3
    elif seconds is None:
        rate = row.number("tokens_per_s")
        each, samples = row.number("tokens_per_s_per_gpu"), row.number("samples_per_s")
        if rate is None and each is not None:
            rate = each * row.required_count("gpus")
        if rate is None and samples is not None:
            rate = samples * row.required_count("seq_len")
        seconds = tokens / rate if rate else None
    if seconds is None or seconds <= 0.0:
        raise Missing("no time: needs iteration_ms, sec_per_iter, tokens_per_s, tokens_per_s_per_gpu or samples_per_s")
    return seconds


def _memory(row: Row) -> float | None:
    found = row.number("mem_gb")
    return None if found is None else found * 1e9


def _known(row: Row, column: str, table: dict[str, str]) -> str:
    text = row.required(column)
    found = first_match(text, table)
    if not found:
        raise Missing(f"{column} = {text!r} has no profile; known are {', '.join(sorted(set(table.values()) - {''}))}")
    return found


def _scenario(row: Row, name: str) -> dict[str, Any]:
    framework = _known(row, "framework", FRAMEWORKS)
    precision = _known(row, "precision", PRECISIONS)
    training: dict[str, Any] = {
        "global_batch": row.required_count("gbs"), "sequence": row.required_count("seq_len"), "precision": precision,
    }  # fmt: skip
    return {
        "schema_version": 1,
        "name": re.sub(r"[^A-Za-z0-9.-]+", "-", name),
        "model": _model(row),
        "training": training,
        "framework": framework,
        "cluster": {"nodes": _nodes(row), "fabric": row.text("fabric") or "rail-optimized"},
        "layout": _layout(row, framework),
    }


def _model(row: Row) -> dict[str, Any] | str:
    preset = row.text("preset")
    if preset is not None:
        return preset
    family = (row.text("family") or "gpt").lower()
    if "bert" in family:
        raise Missing("an encoder's dimensions do not describe it; name a preset in a column preset")
    hidden, heads = row.required_count("hidden"), row.required_count("heads")
    if hidden % heads and row.count("head_dim") is None:
        raise Missing(f"hidden = {hidden} is no multiple of heads = {heads}; state head_dim")
    model: dict[str, Any] = {
        "layers": row.required_count("layers"), "hidden": hidden, "heads": heads,
        "vocab": row.required_count("vocab"),
    }  # fmt: skip
    for column in ("kv_heads", "head_dim", "ffn_hidden"):
        found = row.count(column)
        if found is not None:
            model[column] = found
    if "llama" in family:
        model |= {"gated": True, "norm": "rmsnorm", "bias": False, "rotary": True, "tied": False}
    elif "mpt" in family:
        model |= {"bias": False}
    else:
        model["dropout"] = (row.text("dropout") or ("no" if "bloom" in family else "yes")) in ("yes", "1", "true")
    return model


def _nodes(row: Row) -> dict[str, Any]:
    gpus = row.required_count("gpus")
    profile = row.text("node")
    if profile is None:
        profile = NODES[_known(row, "gpu", DEVICES)]
    per_node = row.count("gpus_per_node") or 8
    per_node = min(per_node, gpus)
    if gpus % per_node:
        raise Missing(f"gpus = {gpus} does not fill nodes of {per_node}")
    count = gpus // per_node
    spec: dict[str, Any] = {"count": count}
    if per_node != 8 or row.text("node") is not None:
        spec["devices"] = per_node
    if count > 1 and row.text("node") is None:
        spec["nic"] = _nic(row.required("inter_node"))
    elif per_node < 8:
        spec["nic"] = {"count": per_node}
    if (row.text("gpu") or "").endswith("32GB"):
        spec["device"] = "v100-sxm2-32g"
    return {profile: spec}


def _nic(text: str) -> dict[str, Any]:
    cards, total = _CARDS.search(text), _TOTAL.search(text)
    if cards is not None:
        count, rate = int(cards.group(1)), float(cards.group(2))
    elif total is not None:
        count, rate = 8, float(total.group(1)) / 8
    else:
        raise Missing(f"inter_node = {text!r} names no cards; write e.g. 8x200Gb/s InfiniBand")
    for (speed, pattern), link in _CARD_LINKS.items():
        if speed == rate and re.search(pattern, text, re.IGNORECASE):
            return {"count": count, "link": link}
    raise Missing(f"inter_node = {text!r}: no link profile of {rate:g} Gb/s")


def _layout(row: Row, framework: str) -> dict[str, Any]:
    tp, pp = row.required_count("tp"), row.required_count("pp")
    virtual = row.count("vpp") or 1
    recompute = _known(row, "recompute", RECOMPUTE)
    layout: dict[str, Any] = {
        "tp": tp, "pp": pp, "micro_batch": row.required_count("mbs"), "virtual_stages": virtual,
        "schedule": "interleaved" if virtual > 1 else "1f1b", "recompute": recompute, "order": "tp-dp-pp",
        "sequence_parallel": _sequence_parallel(row, framework, tp),
    }  # fmt: skip
    for degree in ("dp", "cp", "ep"):
        found = row.count(degree)
        if found is not None and (degree == "dp" or found > 1):
            layout[degree] = found
    gradient = row.text("gradient") or first_match(row.text("precision") or "", {"DEFAULT": "fp32", "PURE": "bf16"})
    if gradient is not None:
        layout["gradient"] = gradient
    stage = int(_known(row, "shard", SHARDING))
    replicas = row.required_count("gpus") // (tp * pp)
    if replicas == 1 or stage == 0:
        layout |= {"sync": "allreduce", "algorithm": "ring"}
    else:
        layout |= {"sync": "sharded", "sharded_stage": stage}
    return layout


def _sequence_parallel(row: Row, framework: str, tp: int) -> bool:
    text = row.text("sp")
    if text is None:
        # Megatron Core's recipes turn it on with tensor parallelism.
        return framework == "megatron-core" and tp > 1
    return text in ("1", "yes", "true") and tp > 1
