"""What cells say in words: patterns of devices, frameworks, precisions, recomputation and sharding."""

from __future__ import annotations

from clustersim.validate.rows import Missing, Row, first_match

# Device profiles by how sources write them; "" has none.
DEVICES = {
    r"L40S": "l40s",
    # Other chips, clocks or wires than those of the boards with NVLink.
    r"PCIe|NVL\b|\bG[HB]\d": "",
    r"H100.*(HBM2e|96 ?GB)": "h100-sxm-96g",
    r"A100.*80 ?GB": "a100-sxm-80g",
    r"A100.*40 ?GB": "a100-sxm-40g",
    r"H100": "h100-sxm",
    r"H200": "h200-sxm",
    r"\bB200": "b200",
    r"V100.*32 ?GB": "v100-sxm2-32g",
    r"V100.*16 ?GB": "v100-sxm2-16g",
}
# The node profile that has a device's interconnect, PCIe and host; its network is overridden where a row states one.
NODES = {
    "a100-sxm-80g": "dgx-a100-80g",
    "a100-sxm-40g": "dgx-a100-40g",
    "h100-sxm": "hgx-h100",
    "h100-sxm-96g": "hgx-h100",
    "h200-sxm": "hgx-h200",
    "b200": "hgx-b200",
    "v100-sxm2-32g": "dgx-1-v100",
    "v100-sxm2-16g": "dgx-1-v100",
    "l40s": "pcie-l40s-8",
}
FRAMEWORKS = {
    # Frozen weights, and loops that are none of the profiles'.
    r"LoRA|HF Trainer|Hugging": "",
    r"llm-foundry|Composer": "llm-foundry",
    r"torchtitan.*compile": "torchtitan-compile",
    r"torchtitan": "torchtitan",
    r"FSDP": "torch-fsdp",
    r"DDP": "torch-ddp",
    r"NeMo|Megatron-Bridge": "nemo",
    r"Megatron-Core|Megatron-LM core": "megatron-core",
    r"DeepSpeed.*LAUNCH_BLOCKING": "megatron-deepspeed-blocking",
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
RECOMPUTE = {
    r"^full|^yes|^true|^on\b|every layer": "full",
    r"^selective|attention core": "selective",
    r"^none|^no\b|^off\b|^false|^0$": "none",
}
# Composer's names of FSDP's mixed precisions, in capitals.
GRADIENTS = {r"(?-i:\bDEFAULT\b)": "fp32", r"(?-i:\bPURE\b)": "bf16"}
SHARDING = {
    r"zero-?3|FULL_SHARD|^FSDP": "3",
    r"zero-?2|SHARD_GRAD_OP": "2",
    r"zero-?1|distributed optimizer": "1",
    r"^none|DDP|^0$": "0",
}
# What may be written in a column, as docs/validation.md has it.
WRITTEN = {
    "gpu": (
        "A100-SXM4-80GB", "A100-SXM4-40GB", "H100-80GB", "H100-HBM2e-96GB", "H200", "B200", "V100-SXM2-32GB",
        "V100-SXM2-16GB", "L40S",
    ),
    "framework": (
        "Megatron-LM", "Megatron-Core", "NeMo", "Megatron-DeepSpeed", "FSDP", "DDP", "torchtitan", "llm-foundry",
        "clustersim",
    ),
    "precision": ("fp8", "bf16", "fp16", "tf32", "fp32"),
    "recompute": ("none", "selective", "full"),
    "shard": ("none", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP"),
}  # fmt: skip


def known(row: Row, column: str, table: dict[str, str]) -> str:
    """What `table` has for a cell that must be there; Missing, with what may be written, where it has nothing."""
    text = row.required(column)
    found = first_match(text, table)
    if found:
        return found
    words = ", ".join(WRITTEN[column][:-1]) + f" or {WRITTEN[column][-1]}"
    if column == "gpu":
        raise Missing(f"gpu = {text!r} has no profile; known are {words}; or name a node profile in a column node")
    if column == "framework":
        raise Missing(f"framework = {text!r} has no profile; known are {words}")
    raise Missing(f"{column} = {text!r} is not understood; write {words}")
