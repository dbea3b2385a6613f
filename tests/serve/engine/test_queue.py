"""Turns, bounds and leaving."""

from rotq.serve.engine.generation import Generation
from rotq.serve.engine.queue import WaitingRoom
from rotq.serve.engine.sampling import Sampling


def of(client: str, number: int = 0) -> Generation:
    return Generation(
        prompt=[number],
        max_tokens=1,
        sampling=Sampling(),
        decode=lambda _: "",
        emit=lambda _: None,
        client=client,
    )


def order(room: WaitingRoom) -> list[tuple[str, int]]:
    found = []
    while (sequence := room.admit(lambda _: True)) is not None:
        found.append((sequence.client, sequence.prompt[0]))
    return found


def test_clients_take_turns_and_keep_their_own_order() -> None:
    room = WaitingRoom(10)
    assert room.enter([of("a", n) for n in range(3)])
    assert room.enter([of("b", 0)])
    assert room.enter([of("c", n) for n in range(2)])
    assert order(room) == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]
    assert len(room) == 0


def test_nobody_overtakes_the_one_whose_turn_it_is() -> None:
    room = WaitingRoom(10)
    big, small = of("a"), of("b")
    room.enter([big])
    room.enter([small])
    assert room.admit(lambda sequence: sequence is small) is None
    assert len(room) == 2


def test_a_request_enters_whole_or_not_at_all() -> None:
    room = WaitingRoom(3)
    assert room.enter([of("a"), of("a")])
    assert not room.enter([of("b"), of("b")])
    assert len(room) == 2
    assert room.enter([of("b")])
    assert not room.enter([of("c")])


def test_leaving() -> None:
    room = WaitingRoom(5)
    room.enter([of("a", 1), of("a", 2)])
    room.enter([of("b", 3)])
    gone = room.leave(lambda sequence: sequence.prompt[0] != 2)
    assert [sequence.prompt[0] for sequence in gone] == [1, 3]
    assert order(room) == [("a", 2)]


def test_a_closed_room() -> None:
    room = WaitingRoom(5)
    room.close()
    assert not room.enter([of("a")])
