"""Reads the Mooncake traces: timestamp (ms), input_length, output_length, hash_ids, a JSON object a line.

A request becomes a program of one call whose prompt is its blocks: one segment a block, keyed by its id, so that requests
with equal first blocks share that prefix. The last block holds what is left of the prompt. All requests are of one sharing
domain. A request that generated 0 tokens counts as one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from sim.workloads.program import Call, Get, Program, Text, WorkloadError, Write
from sim.workloads.source import Row, Source
from sim.workloads.traces import byte_lines

_GETS = (Get(id="answer", var="answer"),)


class MooncakeParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Mooncake trace."""

    block_tokens: Annotated[int, Meta(ge=1, description="tokens of a block; the public traces' are 512")] = 512


class _Request(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def mooncake_source(path: str, p: MooncakeParameters, *, max_gen_length: int, label: str = "") -> Source:
    """The requests of the trace at `path`. Reading raises WorkloadError with file, line and reason."""
    trace = label + Path(path).stem
    block = p.block_tokens

    def build(index: int, arrival_s: float, row: Row) -> Program:
        request: _Request = row[1]
        *whole, last = request.hash_ids
        segments: list[Text | Write] = [Text(f"{trace}/{block_id}", block) for block_id in whole]
        left = request.input_length - block * len(whole)
        # A partial block is another text than the whole one of the same id.
        segments.append(Text(f"{trace}/{last}" if left == block else f"{trace}/{last}/{left}", left))
        generated = request.output_length or 1
        segments.append(Write("answer", generated, generated if generated > max_gen_length else max_gen_length))
        call = Call(tuple(segments), "request", (), False)
        return Program(f"{trace}/{index}", arrival_s, (call,), _GETS, (), trace, "mooncake")

    return Source(path, lambda: _rows(path, block), build)


def _rows(path: str, block: int) -> Iterator[tuple[float, _Request]]:
    """(seconds since the first request, request)."""
    decode = msgspec.json.Decoder(_Request).decode
    first_ms = last_ms = None
    for number, line in byte_lines(path):
        try:
            request = decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            shown = line[:80].decode(errors="replace").strip()
            raise WorkloadError(f"{path}:{number}: not a Mooncake request, truncated or mixed: {error}: {shown!r}") from None
        now_ms = request.timestamp
        if first_ms is None or last_ms is None:
            first_ms = last_ms = now_ms
        if request.input_length < 1:
            raise WorkloadError(f"{path}:{number}: input_length is {request.input_length}; a request has at least 1")
        if request.output_length < 0:
            raise WorkloadError(f"{path}:{number}: output_length is {request.output_length}; it cannot be negative")
        blocks = -(-request.input_length // block)
        if len(request.hash_ids) != blocks:
            raise WorkloadError(
                f"{path}:{number}: {len(request.hash_ids)} hash_ids, but an input_length of {request.input_length} has "
                f"{blocks} blocks of {block} tokens (block_tokens)"
            )
        if now_ms < last_ms:
            raise WorkloadError(f"{path}:{number}: the timestamp {now_ms:g} is before the line above it ({last_ms:g})")
        last_ms = now_ms
        yield (now_ms - first_ms) / 1000.0, request
    if first_ms is None:
        raise WorkloadError(f"{path}: no requests in it")
