"""How much of the prompts is a prefix that came before, were every context kept for ever, in bounded memory.

Follows DESIGN.md's rules of who may share: a prefix is repeated inside one tenant (or one program, where no tenant is
named), and across them only a leading constant with `cache_prefix`. Prefixes that were seen are kept in a Bloom filter, which
takes an unseen one for seen with the probability `false_positive_part`, and never the other way round.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

from sim.workloads.program import Program, Read, Text, Write

_BITS = 1 << 28  #: 32 MiB: with 10 million prefixes, one in 1,000 is mistaken
_HASHES = 4
_SHIFTS = tuple(range(0, 28 * _HASHES, 28))


class Prompt(NamedTuple):
    """A call's prompt in tokens, and how many of its first ones came before."""

    tokens: int
    repeated: int


class SeenPrefixes:
    """All prefixes of the programs that were given to it, in their order."""

    def __init__(self) -> None:
        self._bits = bytearray(_BITS // 8)
        self._set = 0

    @property
    def false_positive_part(self) -> float:
        return float((self._set / _BITS) ** _HASHES)

    def prompts(self, program: Program) -> list[Prompt]:
        """The prompt of each call; the program's prefixes are seen from now on."""
        texts = {source.var: (source.key, source.tokens) for source in program.sets}
        for call in program.calls:
            for segment in call.segments:
                if type(segment) is Write:
                    key = segment.key if segment.key is not None else f"{program.id}/{segment.var}"
                    texts[segment.var] = (key, segment.tokens)
        domain = (program.tenant or f"program/{program.id}").encode()
        prompts = []
        for call in program.calls:
            node, owner = b"", domain
            if call.cache_prefix and type(call.segments[0]) is Text and call.segments[0].tokens:
                owner = b""
            total = repeated = pending = 0
            known = True
            for segment in call.segments:
                if type(segment) is Text:
                    key, tokens = segment.key, segment.tokens
                else:
                    assert type(segment) is Read or type(segment) is Write
                    key, tokens = texts[segment.var]
                if not tokens:
                    continue
                node = blake2b(b"%b\0%b\0%b" % (node, owner, key.encode()), digest_size=16).digest()
                owner = domain
                known = self._see(node) and known
                if type(segment) is Write:
                    total += pending
                    pending = 0
                else:
                    pending += tokens
                    if known:
                        repeated += tokens
            prompts.append(Prompt(total, min(repeated, total)))
        return prompts

    def _see(self, node: bytes) -> bool:
        """Whether `node` was seen; now it is."""
        number = int.from_bytes(node, "little")
        bits, seen = self._bits, True
        for shift in _SHIFTS:
            place = number >> shift & (_BITS - 1)
            mask = 1 << (place & 7)
            if not bits[place >> 3] & mask:
                bits[place >> 3] |= mask
                self._set += 1
                seen = False
        return seen
