"""Server-sent events: whatever the blocks in which they come, the data of each."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines.openai.event_stream import EventReader

STREAM = 'data: {"a":\ndata:  1}\n\n: a comment\nevent: x\nid: 3\n\ndata:ä€\n\ndatas: no\ndata\n\nretry: 9\ndata: [DONE]\n\ndata: cut off\n'
FOUND = ['{"a":\n 1}', "ä€", "", "[DONE]"]


def read_blocks(blocks: list[bytes]) -> list[str]:
    reader = EventReader()
    return [data for block in blocks for data in reader.read_block(block)]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_only_the_data_of_whole_events_is_read(ending: str) -> None:
    data = STREAM.replace("\n", ending).encode()
    assert read_blocks([data]) == FOUND
    assert read_blocks([data[at : at + 1] for at in range(len(data))]) == FOUND


@given(cuts=st.sets(st.integers(0, 120)), ending=st.sampled_from(["\n", "\r\n", "\r"]))
def test_events_do_not_depend_on_the_blocks(cuts: set[int], ending: str) -> None:
    data = STREAM.replace("\n", ending).encode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    assert read_blocks([data[start:end] for start, end in pairwise(edges)]) == FOUND


def test_bytes_that_are_no_utf_8_cost_a_character() -> None:
    assert read_blocks([b"data: a\xffb\n\n"]) == ["a�b"]
