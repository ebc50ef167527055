"""RequestMachine as transcripts: events on the left, every command it answers on the right."""

import pytest

from conductor.plan import (
    Abort,
    Command,
    Deliver,
    Done,
    Fail,
    Need,
    Reason,
    Rejection,
    Release,
    Replan,
    Send,
    Stale,
)
from conductor.request import (
    DECODE_ERRORS_MAX,
    MIGRATIONS_MAX,
    OVERRUN,
    PREFILL_ATTEMPTS_MAX,
    REPLAN_DELAY_MAX_S,
    REPLAN_REJECTIONS_MAX,
    PrefillGroup,
    RequestMachine,
    State,
    request_id_of,
)
from tests.unit.conductor.make import facts, plan


def line(command: Command) -> str:
    match command:
        case Send(_, eid, leg, instance, resume_n):
            return f"send {eid} {leg} to {instance} +{resume_n}"
        case Abort(_, eid, instance):
            return f"abort {eid} at {instance}"
        case Deliver(rid, tokens, finish, leg):
            return f"deliver {rid} {tokens} {finish} from {leg}"
        case Replan(rid, need, emitted_n, exclude, delay_s):
            return f"replan {rid} {need} +{emitted_n} not {'/'.join(exclude)} in {delay_s:g}"
        case Release(_, ticket):
            return f"release {ticket}"
        case Fail(rid, reason, retryable):
            return f"fail {rid}: {reason} ({'retry' if retryable else 'final'})"
        case Stale(_, eid):
            return f"stale {eid}"
        case Done(rid, outcome):
            return f"done {rid} {outcome}"
    raise AssertionError(command)


def lines(commands: list[Command]) -> list[str]:
    return [line(command) for command in commands]


def started(**more: object) -> RequestMachine:
    """Return a machine whose leg 1 runs on p0 (ticket 1), with d0 reserved (ticket 2)."""
    machine = RequestMachine(facts(**more))  # type: ignore[arg-type]
    assert lines(machine.start(plan("p0", "d0"))) == ["send r#p1 prefill to p0 +0"]
    return machine


def decoding(emitted: int = 0, **more: object) -> RequestMachine:
    """Return a machine whose leg 2 runs on d0 and has emitted `emitted` tokens."""
    machine = started(**more)
    machine.prefill_output("r#p1", [7], "length")
    if emitted:
        machine.decode_output("r#d1", list(range(emitted)), None)
    return machine


NOBODY = Rejection(request_id="r", reason=Reason.NO_INSTANCE_ALIVE, retry_after_s=1.0)

# ------------------------------------------------------------ nothing goes wrong


def test_two_legs():
    machine = started()
    assert lines(machine.prefill_output("r#p1", [7], "length")) == [
        "release 1",
        "send r#d1 decode to d0 +0",  # leg 1's token is dropped: leg 2 makes it itself
    ]
    assert lines(machine.decode_output("r#d1", [7], None)) == ["deliver r [7] None from decode"]
    assert lines(machine.decode_output("r#d1", [8, 9], "stop")) == [
        "deliver r [8, 9] stop from decode",
        "release 2",
        "done r finished",
    ]
    assert machine.state is State.DONE
    assert machine.emitted_n == 3


def test_one_whole_leg_gives_its_prefill_charge_back_with_the_first_token():
    machine = RequestMachine(facts())
    assert lines(machine.start(plan(None, "x"))) == ["send r#d1 whole to x +0"]
    assert lines(machine.output("r#d1", [7], None)) == ["release 1", "deliver r [7] None from whole"]
    assert lines(machine.output("r#d1", [], "length")) == [
        "deliver r [] length from whole",
        "release 2",
        "done r finished",
    ]


def test_first_token_mode_delivers_leg_1s_token_and_resumes_after_it():
    machine = started(first_token=True)
    assert lines(machine.output("r#p1", [7], "length")) == [
        "release 1",
        "deliver r [7] None from prefill",
        "send r#d1 decode to d0 +1",
    ]
    assert machine.emitted_n == 1


@pytest.mark.parametrize(("finish", "max_tokens"), [("stop", 16), ("length", 1)])
def test_first_token_mode_needs_no_leg_2_when_the_first_token_is_the_last(finish, max_tokens):
    machine = started(first_token=True, max_tokens=max_tokens)
    assert lines(machine.output("r#p1", [7], finish)) == [
        "release 1",
        f"deliver r [7] {finish} from prefill",
        "release 2",
        "done r finished",
    ]


def test_progress_without_tokens_is_no_command():
    machine = started()
    assert machine.prefill_output("r#p1", [], None) == []
    machine.prefill_output("r#p1", [7], "length")
    assert machine.decode_output("r#d1", [], None) == []


# ------------------------------------------------------------ leg 1 is lost


def test_a_lost_prefill_instance_is_retried_elsewhere_unseen():
    machine = started()
    assert lines(machine.instance_lost("p0")) == [
        "abort r#p1 at p0",  # should it only have been silent
        "release 1",
        "replan r prefill +0 not p0 in 0",
    ]
    assert lines(machine.plan_result(Need.PREFILL, plan("p1", None, 3, 0))) == ["send r#p2 prefill to p1 +0"]
    assert lines(machine.output("r#p1", [7], "length")) == ["stale r#p1"]
    assert lines(machine.output("r#p2", [7], "length")) == ["release 3", "send r#d1 decode to d0 +0"]


def test_a_failed_leg_1_is_retried_without_an_abort():
    machine = started()
    assert lines(machine.output("r#p1", [], "error")) == ["release 1", "replan r prefill +0 not p0 in 0"]


def test_leg_1_is_tried_a_bounded_number_of_times():
    machine = started()
    for attempt in range(1, PREFILL_ATTEMPTS_MAX):
        machine.output(f"r#p{attempt}", [], "error")
        machine.plan_result(Need.PREFILL, plan("p0", None, 10 + attempt, 0))
    assert lines(machine.output(f"r#p{PREFILL_ATTEMPTS_MAX}", [], "error")) == [
        f"release {10 + PREFILL_ATTEMPTS_MAX - 1}",
        f"fail r: prefill on p0 ended with error, after {PREFILL_ATTEMPTS_MAX} attempts (retry)",
        "release 2",
        "done r failed",
    ]


def test_without_prefill_instances_the_reserved_decode_instance_does_all():
    machine = started()
    machine.instance_lost("p0")
    assert lines(machine.plan_result(Need.PREFILL, plan(None, None, 0, 0))) == ["send r#d1 whole to d0 +0"]


def test_a_decode_instance_lost_during_prefill_is_replaced_when_leg_1_is_done():
    machine = started()
    assert lines(machine.instance_lost("d0")) == ["release 2"]
    assert machine.state is State.PREFILLING
    assert lines(machine.output("r#p1", [7], "length")) == ["release 1", "replan r decode +0 not d0 in 0"]
    assert lines(machine.plan_result(Need.DECODE, plan(None, "d1", 0, 4))) == ["send r#d1 decode to d1 +0"]


def test_losing_an_instance_that_does_both_legs_loses_both():
    machine = RequestMachine(facts())
    machine.start(plan("x", "x"))
    assert lines(machine.instance_lost("x")) == [
        "release 2",
        "abort r#p1 at x",
        "release 1",
        "replan r prefill +0 not x in 0",
    ]


# ------------------------------------------------------------ leg 2 is lost


def test_a_decode_instance_that_drains_gives_its_unused_place_up_and_leg_1_goes_on():
    machine = started()
    assert lines(machine.leave_place("another")) == []
    assert lines(machine.leave_place("d0")) == ["release 2"]
    assert lines(machine.leave_place("d0")) == []
    assert lines(machine.output("r#p1", [7], "length")) == ["release 1", "replan r decode +0 not d0 in 0"]


def test_what_decodes_there_already_is_not_moved_when_an_instance_drains():
    assert lines(decoding(emitted=3).leave_place("d0")) == []


def test_a_lost_decode_instance_is_replaced_and_goes_on_after_what_was_emitted():
    machine = decoding(emitted=3)
    assert lines(machine.instance_lost("d0")) == [
        "abort r#d1 at d0",
        "release 2",
        "replan r decode +3 not d0 in 0",
    ]
    assert lines(machine.plan_result(Need.DECODE, plan(None, "d1", 8, 9))) == ["send r#d2 decode to d1 +3"]
    assert lines(machine.output("r#d1", [99], None)) == ["stale r#d1"]
    assert lines(machine.output("r#d2", [3], "stop")) == [
        "release 8",
        "deliver r [3] stop from decode",
        "release 9",
        "done r finished",
    ]


def test_a_failed_leg_2_is_retried_a_bounded_number_of_times():
    machine = decoding()
    for attempt in range(1, DECODE_ERRORS_MAX):
        assert "replan" in line(machine.output(f"r#d{attempt}", [], "error")[-1])
        machine.plan_result(Need.DECODE, plan(None, "d0", 0, 10 + attempt))
    assert lines(machine.output(f"r#d{DECODE_ERRORS_MAX}", [], "error"))[1:] == [
        f"fail r: decode on d0 ended with error, after {DECODE_ERRORS_MAX} attempts (retry)",
        "done r failed",
    ]


def test_migrations_are_bounded():
    machine = decoding(emitted=1)
    for _ in range(MIGRATIONS_MAX):
        assert "replan" in line(machine.instance_lost("d0")[-1])
        machine.plan_result(Need.DECODE, plan(None, "d0", 0, 5))
    assert "fail r: lost" in lines(machine.instance_lost("d0"))[-2]


def test_an_engine_lost_between_the_last_token_and_its_finish_needs_no_successor():
    machine = decoding(emitted=16, max_tokens=16)
    assert lines(machine.instance_lost("d0")) == [
        "abort r#d1 at d0",
        "release 2",
        "deliver r [] length from decode",
        "done r finished",
    ]


def test_a_whole_leg_migrates_as_a_whole_leg():
    machine = RequestMachine(facts())
    machine.start(plan(None, "x"))
    machine.output("r#d1", [7], None)
    machine.instance_lost("x")
    assert lines(machine.plan_result(Need.DECODE, plan(None, "y", 3, 4))) == ["send r#d2 whole to y +1"]


def test_other_instances_may_go_as_they_like():
    machine = decoding()
    assert machine.instance_lost("p0") == []
    assert machine.instance_lost("d7") == []


# ------------------------------------------------------------ nobody is there


def test_a_rejected_replan_is_asked_again_after_a_while_and_given_up_in_the_end():
    machine = decoding()
    machine.instance_lost("d0")
    for _ in range(REPLAN_REJECTIONS_MAX):
        assert lines(machine.plan_result(Need.DECODE, NOBODY)) == [
            f"replan r decode +0 not d0 in {REPLAN_DELAY_MAX_S:g}"
        ]
    assert lines(machine.plan_result(Need.DECODE, NOBODY)) == [
        "fail r: no instance alive (retry)",
        "done r failed",
    ]


def test_a_rejected_prefill_replan_likewise():
    machine = started()
    machine.instance_lost("p0")
    for _ in range(REPLAN_REJECTIONS_MAX):
        assert lines(machine.plan_result(Need.PREFILL, NOBODY)) == [
            f"replan r prefill +0 not p0 in {REPLAN_DELAY_MAX_S:g}"
        ]
    assert lines(machine.plan_result(Need.PREFILL, NOBODY))[-1] == "done r failed"


# ------------------------------------------------------------ the client leaves, or time is up


def test_abort_stops_exactly_the_live_leg():
    assert lines(started().abort()) == ["abort r#p1 at p0", "release 1", "release 2", "done r aborted"]
    assert lines(decoding().abort()) == ["abort r#d1 at d0", "release 2", "done r aborted"]


def test_abort_between_legs_stops_none_and_an_unused_plan_is_given_back():
    machine = decoding()
    machine.instance_lost("d0")
    assert lines(machine.abort()) == ["done r aborted"]
    assert lines(machine.plan_result(Need.DECODE, plan(None, "d1", 5, 6))) == ["release 5", "release 6"]
    assert machine.plan_result(Need.DECODE, NOBODY) == []


def test_abort_while_leg_1_is_being_placed_gives_the_new_place_back():
    machine = started()
    machine.instance_lost("p0")
    assert lines(machine.abort()) == ["release 2", "done r aborted"]
    assert lines(machine.plan_result(Need.PREFILL, plan("p1", None, 5, 0))) == ["release 5"]


def test_abort_before_the_plan_came_gives_the_plan_back():
    machine = RequestMachine(facts())
    assert lines(machine.abort()) == ["done r aborted"]
    assert lines(machine.start(plan("p0", "d0"))) == ["release 1", "release 2"]


def test_a_deadline_stops_the_leg_and_fails():
    assert lines(decoding().deadline()) == [
        "abort r#d1 at d0",
        "fail r: deadline exceeded (final)",
        "release 2",
        "done r failed",
    ]


def test_an_output_that_nobody_had_room_for_stops_the_leg_and_fails_for_another_try():
    ends = [f"fail r: {OVERRUN} (retry)", "release 2", "done r failed"]
    assert lines(decoding().overrun()) == ["abort r#d1 at d0", *ends]
    assert lines(started().overrun()) == ["abort r#p1 at p0", "release 1", *ends]


def test_nothing_moves_a_machine_that_is_done():
    machine = started()
    machine.abort()
    assert machine.abort() == []
    assert machine.deadline() == []
    assert machine.overrun() == []
    assert machine.instance_lost("p0") == []
    assert lines(machine.output("r#p1", [7], "length")) == ["stale r#p1"]
    assert lines(machine.output("r#d1", [7], "length")) == ["stale r#d1"]


# ------------------------------------------------------------ n > 1 share leg 1


def family(count: int) -> tuple[PrefillGroup, list[RequestMachine]]:
    group = PrefillGroup("g")
    machines = [RequestMachine(facts(f"c{i}"), group) for i in range(count)]
    return group, machines


def test_children_share_one_leg_1_and_go_on_apart():
    _, (a, b) = family(2)
    assert lines(a.start(plan("p0", "d0", 1, 2))) == ["send g#p1 prefill to p0 +0"]
    assert lines(b.start(plan("p1", "d1", 3, 4))) == ["release 3"]  # its own leg 1 is not needed
    assert lines(b.output("g#p1", [7], "length")) == [
        "release 1",
        "send c0#d1 decode to d0 +0",
        "send c1#d1 decode to d1 +0",
    ]
    assert lines(a.output("g#p1", [7], "length")) == ["stale g#p1"]


def test_leg_1_is_aborted_only_with_its_last_child():
    _, (a, b) = family(2)
    a.start(plan("p0", "d0", 1, 2))
    b.start(plan("p0", "d1", 0, 4))
    assert lines(a.abort()) == ["release 2", "done c0 aborted"]
    assert lines(b.abort()) == ["abort g#p1 at p0", "release 1", "release 4", "done c1 aborted"]


def test_a_shared_leg_1_is_retried_once_for_all():
    _, (a, b) = family(2)
    a.start(plan("p0", "d0", 1, 2))
    b.start(plan("p0", "d1", 0, 4))
    assert lines(a.instance_lost("p0"))[-1] == "replan c0 prefill +0 not p0 in 0"
    assert b.instance_lost("p0") == []
    assert lines(a.abort()) == ["release 2", "done c0 aborted"]
    # the answer still comes through the child that asked, although it is done
    assert lines(a.plan_result(Need.PREFILL, plan("p1", None, 5, 0))) == ["send g#p2 prefill to p1 +0"]
    assert lines(b.output("g#p2", [7], "length")) == ["release 5", "send c1#d1 decode to d1 +0"]


def test_a_child_that_comes_late_uses_what_leg_1_left():
    _, (a, b, c) = family(3)
    a.start(plan("p0", "d0", 1, 2))
    a.output("g#p1", [7], "length")
    assert lines(b.start(plan("p0", "d1", 3, 4))) == ["release 3", "send c1#d1 decode to d1 +0"]
    a.abort()
    assert lines(c.start(plan("p0", "d1", 5, 6))) == ["release 5", "send c2#d1 decode to d1 +0"]


def test_a_failed_leg_1_fails_all_children_also_late_ones():
    _, (a, b, c) = family(3)
    a.start(plan("p0", "d0", 1, 2))
    b.start(plan("p0", "d1", 0, 4))
    for attempt in range(1, PREFILL_ATTEMPTS_MAX):
        a.output(f"g#p{attempt}", [], "error")
        a.plan_result(Need.PREFILL, plan("p0", None, 1, 0))
    last = lines(a.output(f"g#p{PREFILL_ATTEMPTS_MAX}", [], "error"))
    assert "done c0 failed" in last
    assert "done c1 failed" in last
    assert lines(c.start(plan("p0", "d1", 5, 6)))[-1] == "done c2 failed"


def test_a_leg_1_that_everybody_left_starts_again_for_the_next_child():
    _, (a, b) = family(2)
    a.start(plan("p0", "d0", 1, 2))
    a.abort()
    assert lines(b.start(plan("p1", "d1", 3, 4))) == ["send g#p2 prefill to p1 +0"]
    assert lines(b.output("g#p1", [7], "length")) == ["stale g#p1"]


def test_an_engine_id_names_its_request():
    assert request_id_of("cmpl-1#2#d12") == "cmpl-1#2"
