"""Reads the Mooncake traces: timestamp (ms), input_length, output_length, hash_ids, a JSON object a line.

A request becomes a program of one call whose prompt is its blocks: one segment a block, keyed by its id, so that requests
with equal first blocks share that prefix. The last block holds what is left of the prompt. All requests are of one sharing
domain. A request that generated 0 tokens counts as one token.

Merged, blocks between which no request of the trace ends or differs from another are one segment: the same tokens are
shared, in far fewer pieces. That takes a reading more, and memory for the trace's distinct blocks.
"""

from __future__ import annotations

import itertools
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
    merge: Annotated[bool, Meta(description="whether blocks that the trace never parts are one segment")] = False


class _Request(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def mooncake_source(path: str, p: MooncakeParameters, *, max_gen_length: int, label: str = "") -> Source:
    """The requests of the trace at `path`. Reading raises WorkloadError with file, line and reason."""
    trace = label + Path(path).stem
    block = p.block_tokens
    successors: dict[str, str] = {}

    def rows() -> Iterator[Row]:
        if p.merge and not successors:
            successors.update(_successors(path, block))
        return _rows(path, block)

    def build(index: int, arrival_s: float, row: Row) -> Program:
        request: _Request = row[1]
        pieces = _runs(request, block, successors) if p.merge else _blocks(request, block)
        segments: list[Text | Write] = [Text(f"{trace}/{name}", tokens) for name, tokens in pieces]
        generated = request.output_length or 1
        segments.append(Write("answer", generated, generated if generated > max_gen_length else max_gen_length))
        call = Call(tuple(segments), "request", (), False)
        return Program(f"{trace}/{index}", arrival_s, (call,), _GETS, (), trace, "mooncake")

    return Source(path, rows, build)


def _blocks(request: _Request, block: int) -> Iterator[tuple[str, int]]:
    """Name and tokens of each block; a partial one is another text than the whole one of the same id."""
    *whole, last = request.hash_ids
    for block_id in whole:
        yield str(block_id), block
    left = request.input_length - block * len(whole)
    yield f"{last}" if left == block else f"{last}/{left}", left


def _runs(request: _Request, block: int, successors: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Name and tokens of each run of blocks that are never parted."""
    first, total = "", 0
    for name, tokens in _blocks(request, block):
        first = first or name
        total += tokens
        if successors[name] == SEVERAL:
            yield name if total == tokens else f"{first}-{name}", total
            first, total = "", 0


SEVERAL = ""


def _successors(path: str, block: int) -> dict[str, str]:
    """For each block the one that follows wherever it is; SEVERAL where different ones do, or a request ends with it."""
    successors: dict[str, str] = {}
    for _, request in _rows(path, block):
        names = [name for name, _ in _blocks(request, block)]
        for name, after in itertools.pairwise(names):
            if successors.setdefault(name, after) != after:
                successors[name] = SEVERAL
        successors[names[-1]] = SEVERAL
    return successors


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
