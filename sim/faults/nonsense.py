"""An engine that answers nonsense: what its stream of a task becomes on the way to the core.

Each kind is one that the core can tell from a true answer: it must never become a result. What an engine merely says
otherwise, with nobody shown anything yet, no core can know to be wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from sim.faults.dice import Dice

if TYPE_CHECKING:
    from sim.faults.world import World

_KINDS = ("no json", "no event", "wrong type", "too long", "forced", "contradiction", "negative")


class Nonsense:
    """Alters one answer, once; `task` is the request that it answers."""

    def __init__(self, world: World, dice: Dice, task: dict[str, Any]) -> None:
        self._world = world
        self._kind = dice.pick(_KINDS)
        self._after = dice.number(0, 3)  # parts that pass as they are, for the kinds that may come anywhere
        self._task = task

    def alter(self, item: Any) -> Any:
        """The item as it arrives."""
        if item[0] != "data" or item[1][:1] != b"{":
            return item
        lines = [line for line in item[1].split(b"\n") if line]
        return ("data", b"".join(self._line(line) + b"\n" for line in lines))

    def _line(self, line: bytes) -> bytes:
        kind = self._kind
        if kind in ("no json", "no event", "wrong type"):
            self._after -= 1
            if self._after >= 0:
                return line
            return {"no json": b"\xff\xfe{", "no event": b'{"event":"nonsense"}'}.get(kind, b'{"event":"tokens","ids":"w1"}')
        event = msgspec.json.decode(line)
        if event["event"] != "finished" or not self._applies():
            return line
        if kind == "too long":
            length = self._task["generate"]["sampling"].get("max_gen_length", 512)
            event["ids"] = [7] * (length + 1)
        elif kind == "forced":
            event["ids"] = [70_000, *event["ids"][1:]]
            event["text"] = f"w70000 {event['text'].partition(' ')[2]}"
        elif kind == "contradiction":
            event["text"] = f"nonsense {event['text']}"
        else:
            event["prompt_tokens"] = -1
        return msgspec.json.encode(event)

    def _applies(self) -> bool:
        """Whether the core can know: the attempt was told what to begin with, or a getter has seen something."""
        if self._kind == "forced":
            return bool(self._task["generate"].get("forced_ids"))
        if self._kind != "contradiction":
            return True
        session_id = self._task["task"][0]
        return self._world.shows(session_id, self._task)
