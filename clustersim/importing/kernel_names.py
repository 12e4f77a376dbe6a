"""What a GPU kernel or a PyTorch operation is, by its name.

The names are those that cuBLAS, cuDNN, CUTLASS, FlashAttention, NCCL, Triton and ATen give their kernels. The first
pattern that fits decides: attention kernels are built of products, optimizers of elementwise passes.
"""

from __future__ import annotations

import functools
import re
from typing import Literal

Category = Literal["gemm", "attention", "memory", "optimizer", "collective", "copy", "other"]
CATEGORIES: tuple[Category, ...] = ("gemm", "attention", "memory", "optimizer", "collective", "copy", "other")

_KERNELS: tuple[tuple[Category, re.Pattern[str]], ...] = (
    ("collective", re.compile(r"(nccl|rccl)\w*Kernel|nccl(Dev)?_|multimem_all|(one|two)_shot_all_?reduce"
                              r"|all_reduce_kernel|cross_device_reduce|nvshmem", re.I)),
    ("attention", re.compile(r"flash_?(fwd|bwd|attn|attention)|fmha|sdpa|mha_(fwd|bwd)|flex_attention|attention"
                             r"|efficient_attn", re.I)),
    ("optimizer", re.compile(r"multi_tensor_apply|multi_tensor_adam|adam|lamb|adagrad|\bsgd", re.I)),
    ("gemm", re.compile(r"gemm|gemv|cublas|nvjet|xmma(?!.*conv)|cutlass.*(Kernel|device_kernel)|split_?k_?reduce"
                        r"|\bCijk_|triton_\w*(_mm|_bmm|matmul)|matmul|dot_kernel", re.I)),
    ("memory", re.compile(r"elementwise|vectorized|unrolled|norm|softmax|dropout|reduce|triton|gelu|silu|swiglu|rotary"
                          r"|rope|embedding|index|gather|scatter|cat_?array|copy|fill|nll_loss|cross_entropy|transpose"
                          r"|distribution|random|sort|scan|cast|\bops::|foreach", re.I)),
)  # fmt: skip

_OPS: tuple[tuple[Category, re.Pattern[str]], ...] = (
    ("collective", re.compile(r"^(c10d|gloo|nccl|_c10d_functional)(::|:)", re.I)),
    ("attention", re.compile(r"attention|sdpa|flash", re.I)),
    ("optimizer", re.compile(r"^aten::_?fused_(adam|adamw|sgd|adagrad)_?$")),
    ("gemm", re.compile(r"^aten::(mm|bmm|addmm|baddbmm|addmv|mv|dot|addbmm|_scaled_mm|mkldnn_linear|_int_mm|linear)$")),
    ("memory", re.compile(r"^aten::(_?\w*norm\w*|_?softmax\w*|_?log_softmax\w*|_?\w*dropout\w*|gelu\w*|silu\w*|relu\w*"
                          r"|threshold_backward|add_?|sub_?|mul_?|div_?|sum|mean|sqrt|pow|exp|neg|tanh\w*|sigmoid\w*"
                          r"|copy_|clone|contiguous|_to_copy|to|fill_|zero_|embedding\w*|index\w*|cat|where|bernoulli_"
                          r"|masked_fill_?|nll_loss\w*|cross_entropy\w*|lerp_|addcmul_|addcdiv_|_foreach\w*|stack"
                          r"|gather|scatter\w*|rsqrt|cos|sin|max|min|eq|ne|lt|gt|le|ge)$")),
)  # fmt: skip

_COLLECTIVES = (
    ("all_reduce", r"all_?reduce"), ("reduce_scatter", r"reduce_?scatter"), ("all_gather", r"all_?gather"),
    ("all_to_all", r"all_?to_?all"), ("broadcast", r"broadcast"), ("send_recv", r"send_?recv|_send\b|_recv\b"),
    ("reduce", r"reduce"),
)  # fmt: skip


@functools.lru_cache(maxsize=65_536)
def kernel_category(name: str) -> Category:
    """What a GPU kernel does."""
    return next((category for category, pattern in _KERNELS if pattern.search(name)), "other")


@functools.lru_cache(maxsize=65_536)
def op_category(name: str) -> Category:
    """What a PyTorch operation does that runs on the CPU; `other` for those that only call others."""
    return next((category for category, pattern in _OPS if pattern.search(name)), "other")


def collective_name(name: str) -> str:
    """Which collective a kernel or operation belongs to; `collective` where its name does not say."""
    return next((kind for kind, pattern in _COLLECTIVES if re.search(pattern, name, re.I)), "collective")
