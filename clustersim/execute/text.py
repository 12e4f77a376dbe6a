"""The text that runs train on: bytes as tokens, and a batch for every step that does not depend on the ranks."""

from __future__ import annotations

from pathlib import Path

import torch

# Tokens are bytes.
VOCABULARY = 256

# Odd multipliers of a multiplicative hash: any (step, sequence) goes to a place in the text that looks random.
_SPREAD = 2654435761
_SEED_SPREAD = 40503


class Text:
    """The shipped text as tokens; sequence i of step k starts at a place that only (seed, k, i) decides."""

    def __init__(self, seed: int, global_batch: int, sequence: int) -> None:
        raw = (Path(__file__).parent / "corpus.txt").read_bytes()
        self._tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        self._seed = seed
        self._global_batch = global_batch
        # One more than the sequence: the target of a token is the one behind it.
        self._window = torch.arange(sequence + 1)

    def batch(self, step: int, sequences: range, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of `sequences` (numbers in the global batch) in step `step`: two int64 tensors of shape
        (sequences, sequence length). The text is a ring."""
        numbers = [step * self._global_batch + index for index in sequences]
        starts = [(n * _SPREAD + self._seed * _SEED_SPREAD) % 2**32 % len(self._tokens) for n in numbers]
        at = torch.tensor(starts, dtype=torch.int64).reshape(-1, 1) + self._window
        tokens = self._tokens[at % len(self._tokens)].to(torch.int64)
        if device.type != "cpu":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]
