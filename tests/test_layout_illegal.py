"""Layouts that no scenario allows: the key to blame, the equation that it breaks, and values that are legal."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.errors import NoFeasibleLayout
from clustersim.layout.illegal import why_illegal
from clustersim.layout.space import layouts
from clustersim.scenario.load import question
from clustersim.scenario.question import Question
from clustersim.search.search import choices_of, survey


def _asked(layout: dict[str, Any], batch: int = 32, nodes: int = 1, model: str = "gpt3-125m") -> Question:
    return question(
        {
            "schema_version": 1,
            "name": "illegal",
            "model": model,
            "training": {"global_batch": batch, "sequence": 1024},
            "framework": "megatron-lm",
            "cluster": {"nodes": {"dgx-a100-80g": nodes}},
            "layout": layout,
        },
        "illegal",
    )


def _why(asked: Question) -> tuple[str, str] | None:
    return why_illegal(asked.workload, asked.cluster, asked.framework, choices_of(asked))


def _count(asked: Question) -> int:
    return len(layouts(asked.workload, asked.cluster, asked.framework, choices_of(asked)))


@pytest.mark.parametrize(
    ("layout", "key", "words"),
    [
        ({"tp": 5}, "tp", "5: 12 heads of gpt3-125m % tp 5 = 2, not 0; write 4, or leave it out"),
        ({"pp": 3}, "pp", "3: 8 devices % (pp 3) = 2, not 0; write 2 or 4, or leave it out"),
        ({"pp": 16}, "pp", "16: gpt3-125m has 12 layers, fewer than stages; write 8"),
        ({"dp": 16}, "dp", "16: 8 devices % (dp 16) = 8, not 0; write 8"),
        ({"tp": 2, "pp": 8}, "tp", "2: 8 devices % (tp 2 * pp 8) = 8, not 0; write 1"),
        ({"dp": 1, "tp": 2, "pp": 2, "cp": 1}, "dp", "= 4 ranks, and the cluster has 8 devices; write 2"),
        ({"micro_batch": 64}, "micro_batch", "64: global_batch 32 has fewer samples than dp 1 * micro_batch 64"),
        (
            {"pp": 4, "schedule": "interleaved", "virtual_stages": 2},
            "pp",
            "4: 12 layers of gpt3-125m % (pp 4 * virtual_stages 2) = 4, not 0; write 2",
        ),
        # The key that is wrong by itself, not the one beside it.
        ({"pp": 2, "recompute": "full", "tp": 5}, "tp", "5: 12 heads"),
        ({"tp": 1, "sequence_parallel": True, "dp": 8}, "sequence_parallel", "true: no legal layout has it beside"),
        ({"sharded_stage": 3, "sync": "sharded", "pp": 2}, "pp", "beside sharded_stage: 3; write 1"),
        ({"sync": "parameter-server", "servers": 4}, "servers", "4: cluster.servers has 0 hosts"),
        ({"sync": "parameter-server", "placement": "dedicated"}, "placement", "dedicated: cluster.servers has 0 hosts"),
    ],
)
def test_the_key_to_blame_and_the_equation(layout: dict[str, Any], key: str, words: str) -> None:
    asked = _asked(layout)
    found = _why(asked)
    assert found is not None
    assert found[0] == key
    assert words in found[1]
    with pytest.raises(NoFeasibleLayout, match=re.escape(words)) as told:
        survey(asked)
    assert told.value.path == ("layout", key)


def test_key_value_heads_and_batches() -> None:
    grouped = _asked({"tp": 16}, nodes=6, batch=96, model="llama3-70b")
    assert _count(grouped) > 0
    neither = _why(_asked({"tp": 12}, nodes=3, batch=96, model="llama3-70b"))
    assert neither is not None
    assert "64 heads of llama3-70b % tp 12 = 4, not 0; write 8 or 24" not in neither[1]
    assert "write 8" in neither[1]
    odd = _why(_asked({"dp": 8}, batch=12))
    assert odd is not None
    assert odd == ("dp", "8: global_batch 12 % dp 8 = 4, not 0; write 4, or leave it out")


@settings(max_examples=60, deadline=None)
@given(
    layout=st.fixed_dictionaries(
        {},
        optional={
            "tp": st.integers(1, 13),
            "pp": st.integers(1, 13),
            "dp": st.integers(1, 9),
            "micro_batch": st.integers(1, 20),
            "sequence_parallel": st.booleans(),
        },
    ),
    batch=st.integers(1, 40),
)
def test_a_value_that_is_proposed_is_legal_by_itself_or_beside_the_others(layout: dict[str, Any], batch: int) -> None:
    asked = _asked(layout, batch)
    if _count(asked):
        return
    found = _why(asked)
    if found is None:
        return
    key, told = found
    assert told.startswith(f"{str(layout[key]).lower()}: ")
    proposed = re.search(r"; write ([\w ]+), or leave it out$", told)
    assert proposed is not None, told
    alone = _count(_asked({key: layout[key]}, batch)) == 0
    for word in proposed.group(1).split(" or "):
        value = {"true": True, "false": False}.get(word) if word in ("true", "false") else int(word)
        legal = _count(_asked({**layout, key: value}, batch)) > 0
        # A key that is wrong by itself may stand beside others that are wrong too.
        assert legal or (alone and _count(_asked({key: value}, batch)) > 0), (layout, told)
