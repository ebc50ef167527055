"""The OpenAI and Anthropic clients work as against any other server, across prefill and decode."""

import json
from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.integration.cluster import BLOCK, Cluster
from tests.integration.reference import random_prompt
from tests.integration.setups import BF16

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [BF16], ids=lambda setup: setup.name, indirect=True),
]

HELLO = [{"role": "user", "content": "Tell me about leases and blocks."}]
GREEDY = {"temperature": 0}
"""The Anthropic client has no such parameter any more; the server has."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
            "strict": True,  # else vLLM 0.32 accepts any JSON value as arguments
        },
    }
]


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=60.0, max_retries=0) as client:
        yield client


@pytest.fixture
def claude(cluster: Cluster) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=cluster.url, api_key="none", timeout=60.0, max_retries=0) as client:
        yield client


@pytest.fixture
def name(cluster: Cluster) -> str:
    return cluster.client.model


class TestChat:
    def test_an_answer_and_its_usage(self, client: openai.OpenAI, name: str):
        answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=16, temperature=0)
        (choice,) = answer.choices
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert answer.usage.completion_tokens == 16
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16

    def test_a_stream_says_the_same_as_a_whole_answer(self, client: openai.OpenAI, name: str):
        wish = {"model": name, "messages": HELLO, "max_tokens": 40, "temperature": 0}
        whole = client.chat.completions.create(**wish)
        chunks = list(
            client.chat.completions.create(**wish, stream=True, stream_options={"include_usage": True})
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason

    def test_several_choices_are_sampled_apart(self, client: openai.OpenAI, name: str):
        answer = client.chat.completions.create(
            model=name, messages=HELLO, max_tokens=16, n=3, temperature=1.0, seed=3
        )
        assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
        assert len({choice.message.content for choice in answer.choices}) == 3
        assert answer.usage.completion_tokens <= 48

    def test_a_seed_repeats_an_answer(self, client: openai.OpenAI, name: str):
        def ask(seed: int) -> str:
            answer = client.chat.completions.create(
                model=name, messages=HELLO, max_tokens=24, temperature=1.0, seed=seed
            )
            return answer.choices[0].message.content

        assert ask(1) == ask(1) != ask(2)

    def test_logprobs(self, client: openai.OpenAI, name: str):
        answer = client.chat.completions.create(
            model=name, messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
        )
        steps = answer.choices[0].logprobs.content
        assert len(steps) == 8
        for step in steps:
            assert step.logprob == max(top.logprob for top in step.top_logprobs) <= 0
            assert len(step.top_logprobs) == 3

    def test_a_stop_string_ends_an_answer(self, client: openai.OpenAI, name: str):
        wish = {"model": name, "messages": HELLO, "max_tokens": 60, "temperature": 0}
        whole = client.chat.completions.create(**wish).choices[0].message.content
        stop = whole[len(whole) // 2 :][:3]
        answer = client.chat.completions.create(**wish, stop=[stop]).choices[0]
        assert answer.finish_reason == "stop"
        assert answer.message.content == whole[: whole.index(stop)]

    def test_a_json_schema_binds_the_answer(self, client: openai.OpenAI, name: str):
        schema = {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "warm": {"type": "boolean"},
                "parts": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 3},
            },
            "required": ["city", "warm", "parts"],
            "additionalProperties": False,
        }
        # a random model may fill the limit with blanks, which JSON allows: then its answer is cut off
        for seed in range(4, 12):
            answer = client.chat.completions.create(
                model=name, messages=HELLO, max_tokens=400, temperature=0.8, seed=seed,
                response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
            )  # fmt: skip
            if answer.choices[0].finish_reason == "stop":
                break
        # not strict: a string with a maxLength may hold a tab, as vLLM's grammar has it
        value = json.loads(answer.choices[0].message.content, strict=False)
        assert value.keys() == {"city", "warm", "parts"}
        assert isinstance(value["warm"], bool)
        assert set(value["parts"]) <= {"a", "b"}

    def test_a_named_tool_is_called(self, client: openai.OpenAI, name: str):
        answer = client.chat.completions.create(
            model=name,
            messages=HELLO,
            max_tokens=400,
            temperature=1,
            seed=1,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
        )  # fmt: skip -- greedily, a random model may write white space until it is cut off
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments).keys() == {"city"}

    def test_tools_may_be_left_alone(self, client: openai.OpenAI, name: str):
        answer = client.chat.completions.create(
            model=name, messages=HELLO, max_tokens=12, temperature=0, tools=TOOLS, tool_choice="auto"
        )
        assert answer.choices[0].message.content  # a random model calls nothing; the parser is in the way

    def test_token_ids_come_on_request(self, client: openai.OpenAI, name: str):
        answer = client.chat.completions.create(
            model=name, messages=HELLO, max_tokens=8, temperature=0, extra_body={"return_token_ids": True}
        )
        assert len(answer.choices[0].token_ids) == 8
        assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens

    def test_cached_tokens_are_told(self, client: openai.OpenAI, name: str):
        messages = [{"role": "user", "content": "A prefix that both share. " * 21}]
        first = client.chat.completions.create(model=name, messages=messages, max_tokens=4)
        second = client.chat.completions.create(model=name, messages=messages, max_tokens=4)
        assert first.usage.prompt_tokens % BLOCK  # else the last block may or may not be counted
        full = first.usage.prompt_tokens // BLOCK * BLOCK
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        assert second.usage.prompt_tokens_details.cached_tokens == full > 0


class TestCompletions:
    def test_echo_returns_the_prompt_with_its_logprobs(self, client: openai.OpenAI, name: str):
        prompt = random_prompt(50, 8000)
        answer = client.completions.create(
            model=name, prompt=prompt, max_tokens=4, temperature=0, echo=True, logprobs=1
        )
        logprobs = answer.choices[0].logprobs
        assert len(logprobs.tokens) == 54
        assert logprobs.token_logprobs[0] is None
        assert all(value is not None for value in logprobs.token_logprobs[1:])
        plain = client.completions.create(model=name, prompt=prompt, max_tokens=4, temperature=0)
        assert answer.choices[0].text.endswith(plain.choices[0].text)

    def test_prompt_logprobs(self, client: openai.OpenAI, name: str):
        prompt = random_prompt(70, 8001)
        answers = [
            client.completions.create(
                model=name, prompt=prompt, max_tokens=4, temperature=0, extra_body={"prompt_logprobs": 1}
            )
            for _ in range(2)
        ]
        for answer in answers:
            scores = answer.choices[0].prompt_logprobs
            assert len(scores) == 70
            assert scores[0] is None
            for token, step in zip(prompt[1:], scores[1:], strict=True):
                assert str(token) in step
        # a prompt that is known is scored again all the same
        assert answers[0].choices[0].text == answers[1].choices[0].text

    def test_several_prompts_in_one_request(self, client: openai.OpenAI, name: str):
        prompts = ["one", "two two", "three three three"]
        answer = client.completions.create(model=name, prompt=prompts, max_tokens=6, temperature=0)
        alone = [
            client.completions.create(model=name, prompt=prompt, max_tokens=6, temperature=0)
            for prompt in prompts
        ]
        assert [choice.text for choice in answer.choices] == [one.choices[0].text for one in alone]

    def test_n_streams_are_told_apart(self, client: openai.OpenAI, name: str):
        chunks = client.completions.create(
            model=name, prompt="leases", max_tokens=12, temperature=1.0, seed=5, n=2, stream=True
        )
        texts = {0: "", 1: ""}
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts[0]
        assert texts[1]
        assert texts[0] != texts[1]


class TestResponses:
    def test_an_answer(self, client: openai.OpenAI, name: str):
        answer = client.responses.create(
            model=name, input="Hello there.", max_output_tokens=16, temperature=0
        )
        assert answer.output_text
        assert answer.usage.output_tokens == 16

    def test_a_stream_ends_with_the_whole_answer(self, client: openai.OpenAI, name: str):
        wish = {"model": name, "input": "Hello there.", "max_output_tokens": 16, "temperature": 0}
        events = list(client.responses.create(**wish, stream=True))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert events[0].type == "response.created"
        assert text == client.responses.create(**wish).output_text


class TestAnthropic:
    def test_a_message(self, claude: anthropic.Anthropic, name: str):
        message = claude.messages.create(model=name, max_tokens=16, messages=HELLO, extra_body=GREEDY)
        assert message.role == "assistant"
        assert message.content[0].text
        assert message.usage.output_tokens == 16
        assert message.stop_reason == "max_tokens"

    def test_a_stream_says_the_same(self, claude: anthropic.Anthropic, name: str):
        wish = {"model": name, "max_tokens": 24, "messages": HELLO, "system": "Brief.", "extra_body": GREEDY}
        with claude.messages.stream(**wish) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == final.content[0].text == claude.messages.create(**wish).content[0].text
        assert final.usage.output_tokens == 24


class TestTheRest:
    def test_the_model_is_listed(self, client: openai.OpenAI, name: str):
        assert [model.id for model in client.models.list()] == [name]

    def test_embeddings_are_not_served(self, client: openai.OpenAI, name: str):
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model=name, input="x")

    def test_an_unknown_model_is_not_found(self, client: openai.OpenAI, claude: anthropic.Anthropic):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-9", messages=HELLO)
        with pytest.raises(anthropic.NotFoundError):
            claude.messages.create(model="claude-9", max_tokens=4, messages=HELLO)

    def test_nothing_is_left_behind(self, cluster: Cluster):
        cluster.assert_nothing_leaked()
