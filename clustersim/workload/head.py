"""The head on one rank: its tokens, its columns of the vocabulary, and the kernels before and beside the logits."""

from __future__ import annotations

from dataclasses import dataclass

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import Gemm, Kernel, Kernels
from clustersim.workload.block import Block
from clustersim.workload.model import vocab_per_rank, with_rows
from clustersim.workload.training import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What one rank computes of the head for one micro-batch, behind layers of which it computes `block`.

    The head sees `sequence` tokens of each sequence on the rank, and has `vocab` rows over all tensor-parallel ranks.
    `in_place`: the loss reads 16-bit logits and writes their gradient over them; `in_steps`: every step of it is a
    kernel. `metrics`: further cross-entropies of the same logits.
    """

    block: Block
    sequence: int
    vocab: int
    in_place: bool
    in_steps: bool
    metrics: int

    def __post_init__(self) -> None:
        assert not self.block.sequence_parallel or self.tokens % self.block.tp == 0, (self.tokens, self.block.tp)

    @classmethod
    def of(cls, block: Block, training: Training, framework: Framework) -> Head:
        """The head as the framework computes it."""
        return cls(
            block=block, sequence=training.head_sequence(block.rank_sequence, block.tp),
            vocab=with_rows(block.model, framework.vocab_multiple * block.tp).vocab, in_place=framework.in_place_loss,
            in_steps=framework.loss_in_steps, metrics=framework.loss_metrics,
        )  # fmt: skip

    @classmethod
    def plain(cls, block: Block, *, in_place: bool, in_steps: bool) -> Head:
        """The head that sees every token, of the vocabulary as it is published, with the loss alone."""
        return cls(
            block=block, sequence=block.rank_sequence, vocab=block.model.vocab, in_place=in_place, in_steps=in_steps,
            metrics=0,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens that enter the logits."""
        return self.sequence * self.block.micro_batch

    @property
    def local(self) -> int:
        """Tokens that enter norms and the transform."""
        return self.tokens // self.block.tp if self.block.sequence_parallel else self.tokens

    @property
    def columns(self) -> int:
        """Logits of a token on one rank."""
        return vocab_per_rank(self.vocab, self.block.tp, padded=False)

    def gemm(self, m: int, n: int, k: int) -> tuple[Kernel, int]:
        return Gemm(m=m, n=n, k=k, dtype=self.block.soft_dtype), 1

    def pooler(self) -> Kernels:
        """One token of each sequence through the pooler and the classifier."""
        model, batch = self.block.model, self.block.micro_batch
        return tuple(self.gemm(batch, n, model.hidden) for n in (model.hidden, model.classes) if model.pooler and n)

    def pooler_backward(self) -> Kernels:
        model, batch, h = self.block.model, self.block.micro_batch, self.block.model.hidden
        outputs = [n for n in (model.classes, h) if model.pooler and n]
        return tuple(kernel for n in outputs for kernel in (self.gemm(batch, h, n), self.gemm(n, h, batch)))

    def transform(self) -> Kernels:
        if not self.block.model.head_transform:
            return ()
        h, n, moved = self.block.model.hidden, self.local * self.block.model.hidden, self.block.moved
        return self.gemm(self.local, h, h), *moved("activation", n, n), *moved("norm", n, n)

    def transform_backward(self) -> Kernels:
        if not self.block.model.head_transform:
            return ()
        h, n, moved = self.block.model.hidden, self.local * self.block.model.hidden, self.block.moved
        return (
            *moved("norm", 2 * n, n),
            *moved("activation", 2 * n, n),
            self.gemm(self.local, h, h),
            self.gemm(h, h, self.local),
        )
