"""Streamed answers whose chunks differ in their text alone, without a pydantic model for each token.

vLLM makes three models per token to write one line of JSON; most of that line is the same throughout an
answer. Here vLLM's own generator writes the first chunks, the last ones, usage and errors, byte for byte as
ever; those between are its first one with another text. Requests whose chunks carry more (logprobs, token
ids, running usage, several choices, parsed reasoning or tools) keep vLLM's generator throughout.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Final

import msgspec

Inner = Callable[[AsyncIterator[Any]], AsyncGenerator[str, None]]
"""vLLM's generator, but for where its results come from."""

CHAT_TEXT: Final = (b'"delta":{"content":', b"}")
COMPLETION_TEXT: Final = (b'"text":', b",")
"""What stands before and after the text of a chunk."""

_json = msgspec.json.Encoder()


class _Held:
    """The results that vLLM's generator sees: first those handed over, then what `source` still gives."""

    def __init__(self, source: AsyncIterator[Any]) -> None:
        self.results: list[Any] = []
        self.error: Exception | None = None
        self._source = source

    def __aiter__(self) -> "_Held":
        return self

    async def __anext__(self) -> Any:
        if self.results:
            return self.results.pop(0)
        if self.error is not None:
            raise self.error
        return await anext(self._source)


def template(chunk: str, text: str, around: tuple[bytes, bytes]) -> tuple[bytes, bytes] | None:
    """Return what stands before and after `text` in `chunk`, where it is the only changing part."""
    before, after = around
    # from the right: names that a client chose stand before the text, and nothing of its own after it
    head, found, tail = chunk.encode().rpartition(before + _json.encode(text) + after)
    return (head + before, after + tail) if found else None


async def quick(
    inner: Inner,
    results: AsyncIterator[Any],
    around: tuple[bytes, bytes],
    output_of: Callable[[Any], Any],
    opening: int,
) -> AsyncGenerator[str | bytes, None]:
    """Yield the same bytes as `inner(results)`.

    Args:
        inner: makes vLLM's generator.
        results: of the engine: one choice, all alike but for text, tokens and, in the last, the end.
        around: CHAT_TEXT or COMPLETION_TEXT.
        output_of: the one CompletionOutput of a result.
        opening: chunks that come before the first with text.
    """
    held = _Held(results)
    chunks = inner(held)
    sides: tuple[bytes, bytes] | None = None
    hidden: list[int] = []  # tokens that vLLM's generator has to count, but not to write
    try:
        async for result in results:
            output = output_of(result)
            if sides is None or output.finish_reason is not None:
                held.results.append(result)
                if output.finish_reason is not None:
                    output.token_ids = [*hidden, *output.token_ids]
                    break
                for _ in range(opening):
                    yield await anext(chunks)
                opening = 0
                if output.text or output.token_ids:  # else it waits for more
                    yield (chunk := await anext(chunks))
                    if output.token_ids:  # until then it passes over what is empty
                        sides = template(chunk, output.text, around)
                        if sides is None:
                            break
                continue
            hidden += output.token_ids
            yield b"%b%b%b" % (sides[0], _json.encode(output.text), sides[1])
    except Exception as error:  # noqa: BLE001 # whatever it is, vLLM's generator tells the client
        held.error = error
    async for chunk in chunks:
        yield chunk


def quick_chat(serving: Any) -> Any:
    """Return a chat handler like `serving` whose plain streams are quick."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    class QuickChat(OpenAIServingChat):  # type: ignore[misc]
        def chat_completion_stream_generator(
            self, request: Any, result_generator: Any, *args: Any, **kwargs: Any
        ) -> AsyncGenerator[str | bytes, None]:
            whole = super().chat_completion_stream_generator

            def inner(results: Any) -> AsyncGenerator[str, None]:
                return whole(request, results, *args, **kwargs)  # type: ignore[no-any-return]

            if self.parser_cls is not None or request.logprobs or not _plain(self, request):
                return inner(result_generator)
            return quick(inner, result_generator, CHAT_TEXT, lambda result: result.outputs[0], 1)

    return _alike(serving, OpenAIServingChat, QuickChat)


def quick_completion(serving: Any) -> Any:
    """Return a completion handler like `serving` whose plain streams are quick."""
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    class QuickCompletion(OpenAIServingCompletion):  # type: ignore[misc]
        def completion_stream_generator(
            self, request: Any, engine_inputs: Any, result_generator: Any, *args: Any, **kwargs: Any
        ) -> AsyncGenerator[str | bytes, None]:
            whole = super().completion_stream_generator

            def inner(results: Any) -> AsyncGenerator[str, None]:
                return whole(request, engine_inputs, results, *args, **kwargs)  # type: ignore[no-any-return]

            if len(engine_inputs) != 1 or request.logprobs is not None or not _plain(self, request):
                return inner(result_generator)
            return quick(inner, result_generator, COMPLETION_TEXT, lambda pair: pair[1].outputs[0], 0)

    return _alike(serving, OpenAIServingCompletion, QuickCompletion)


def _plain(serving: Any, request: Any) -> bool:
    """Whether the chunks of an answer differ in their text alone."""
    options = request.stream_options
    return (
        request.n in (None, 1)
        and not request.echo
        and not request.return_token_ids
        and not getattr(serving, "enable_log_outputs", False)  # chats alone have it
        and not serving.enable_force_include_usage
        and (options is None or not options.continuous_usage_stats)
    )


def _alike(serving: Any, kind: type, quicker: Any) -> Any:
    """Return an object of `quicker` with the state of `serving`; itself if it is something else already."""
    if type(serving) is not kind:
        return serving
    made = quicker.__new__(quicker)
    vars(made).update(vars(serving))
    return made
