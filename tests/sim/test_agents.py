"""Agents in the simulator: what they ask is a function of a seed; keeping and appending do what they say."""

from benchmarks.sim.agents import AgentConfig, AgentWorld, Features, Program, programs_of, report_of
from benchmarks.sim.nouns import WorldConfig
from benchmarks.sim.profile import DEFAULT, read_profile
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest
from conductor.plan import Decision

SMALL = AgentConfig(rate=0.4, length_s=60.0, turns_min=3, turns_max=8)

STRANGERS = [
    TraceRequest(n / 2, 16 * BLOCK_TOKENS, 20, tuple(range(16 * n, 16 * n + 16))) for n in range(120)
]
"""Prompts that nobody sends again."""


def ran(features: Features, **config: object) -> AgentWorld:
    settings = WorldConfig(**({"prefill": 2, "decode": 2} | config))  # type: ignore[arg-type]
    world = AgentWorld(STRANGERS, programs_of(SMALL, 1), read_profile(DEFAULT), settings, features)
    world.run()
    return world


def test_a_seed_gives_the_same_programs_and_another_one_others():
    assert programs_of(SMALL, 1) == programs_of(SMALL, 1) != programs_of(SMALL, 2)


def test_a_turn_s_prompt_begins_with_all_of_the_last_one_s_full_blocks():
    programs = programs_of(SMALL, 1)
    assert len(programs) > 10
    for program in programs:
        assert SMALL.turns_min <= len(program.turns) <= SMALL.turns_max
        for before, after in zip(program.turns, program.turns[1:], strict=False):
            full = before.input_tokens // BLOCK_TOKENS
            assert after.hash_ids[:full] == before.hash_ids[:full]
            assert after.input_tokens > before.input_tokens + before.output_tokens
            assert after.pause_s > 0


def test_every_program_comes_to_its_end_in_its_own_time():
    world = ran(Features())
    report = report_of(world)
    assert (report.programs, report.cut) == (len(world.programs), 0)
    assert len(world.turns) == sum(len(program.turns) for program in world.programs)
    for number, took_s in world.took_s.items():
        program: Program = world.programs[number]
        assert took_s > program.pauses_s


def test_what_is_kept_is_found_again_where_memory_is_scarce_and_at_the_end_nothing_is_kept():
    scarce = {"host_blocks": 200}
    without, kept = ran(Features(), **scarce), ran(Features(keep=True), **scarce)
    assert report_of(kept).hit > report_of(without).hit
    assert kept.agents.kept.total == 0


def test_turns_are_appended_where_they_are_decoded():
    config = {"decode_host_blocks": 500, "chunk_tokens": 512, "mixed": True, "prefill": 1}
    world = ran(Features(), append=True, **config)
    appended = [entry for entry in world.entries if entry.plan and entry.plan.decision is Decision.APPENDED]
    assert appended
    assert all(entry.trace.input_tokens < 2 * entry.hit_tokens for entry in appended)
    assert report_of(world).later_ttft_mean < report_of(ran(Features(), **config)).later_ttft_mean
