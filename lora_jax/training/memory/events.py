"""Moments of a program, what is in memory at each, and the most that is there at any of them."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence


class Buffer:
    """Bytes of a device, from the moment that writes them to the last one that reads them.

    Attributes:
      size: their number; 0 for what an outer program counts.
      is_frozen: whether a base's arrays alone are in it, which no step changes.
    """

    __slots__ = ("is_frozen", "size")

    def __init__(self, size: int, *, is_frozen: bool = False) -> None:
        self.size, self.is_frozen = size, is_frozen


@dataclasses.dataclass(frozen=True)
class Event:
    """A moment of a program.

    Attributes:
      reads, writes: buffers.
      alone: bytes that it takes for itself, such as those of a loop's body.
      in_place: whether it may write where it reads for the last time.
    """

    reads: frozenset[Buffer]
    writes: tuple[Buffer, ...]
    alone: int = 0
    in_place: bool = True


def peak(events: Sequence[Event], begin: Iterable[Buffer], end: Collection[Buffer]) -> int:
    """Returns the most bytes at any moment.

    Args:
      events: in order.
      begin, end: buffers that are there from the beginning, and until the end.

    >>> from lora_jax.training.memory.events import Buffer, Event, peak
    >>> a, b, c = Buffer(5), Buffer(3), Buffer(2)
    >>> product = Event(frozenset({a}), (b,), in_place=False)
    >>> peak([product, Event(frozenset({b}), (c,), alone=4)], [a], [c])
    8
    """
    last = {buf: at for at, event in enumerate(events) for buf in (*event.reads, *event.writes)}
    last |= dict.fromkeys(end, len(events))
    ending: dict[int, set[Buffer]] = {}
    for buffer, at in last.items():
        ending.setdefault(at, set()).add(buffer)
    live = {*begin}
    size = most = _bytes(live)
    for at, event in enumerate(events):
        new, dying = {*event.writes} - live, ending.get(at, set())
        made, freed = _bytes(new), _bytes(dying & live)
        most = max(most, size + event.alone + (max(0, made - freed) if event.in_place else made))
        live |= new
        gone = dying & live
        live -= gone
        size += made - _bytes(gone)
    return most


def _bytes(buffers: Iterable[Buffer]) -> int:
    return sum(buffer.size for buffer in buffers)
