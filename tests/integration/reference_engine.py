"""Stock vLLM engines, no Mooncake: reads jobs as JSON on stdin, writes answers as JSON on stdout.

Same model, dtype, block size, chunk size and thread count as the cluster under test: what the
cluster must reproduce. Input: {"core": int, "engines": [{"arguments": {...of LLM}, "groups":
[[{"prompt": [ids], "params": {...of SamplingParams}}]]}]}; the jobs of one group are one batch.
vLLM is imported once; every engine is a fork, so that one leaves nothing behind for the next.
"""

import json
import os
import sys
import traceback
from typing import Any


def _job_params(job: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = dict(job["params"])
    if grammar := params.pop("structured_outputs", None):
        params["structured_outputs"] = StructuredOutputsParams(**grammar)
    if bias := params.pop("logit_bias", None):
        params["logit_bias"] = {int(token): value for token, value in bias.items()}  # JSON keys are text
    return SamplingParams(**params)


def _answer(output: Any) -> dict[str, Any]:
    choice = output.outputs[0]
    logprobs = choice.logprobs or []
    return {
        "tokens": list(choice.token_ids),
        "text": choice.text,
        "finish": choice.finish_reason,
        "logprobs": [step[token].logprob for step, token in zip(logprobs, choice.token_ids, strict=False)],
        "cached": output.num_cached_tokens,
    }


def _run_engine(arguments: dict[str, Any], groups: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    from vllm import LLM

    llm = LLM(**arguments)
    answers = []
    for group in groups:
        llm.reset_prefix_cache()  # every group starts cold
        prompts = [{"prompt_token_ids": job["prompt"]} for job in group]
        outputs = llm.generate(prompts, [_job_params(job) for job in group], use_tqdm=False)
        answers.append([_answer(output) for output in outputs])
    return answers


def _in_fork(engine: dict[str, Any]) -> list[list[dict[str, Any]]]:
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with os.fdopen(writable, "w") as out:
                json.dump(_run_engine(engine["arguments"], engine["groups"]), out)
        except BaseException:  # noqa: BLE001 - told by stderr, never back into the parent's code
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)  # no engine threads to wait for
    os.close(writable)
    with os.fdopen(readable) as source:
        text = source.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def main() -> None:
    """Answer the one request on stdin."""
    work = json.load(sys.stdin)
    answers_fd = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to stdout: keep it for the answer
    os.sched_setaffinity(0, [work["core"]])
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker

    assert vllm.v1.worker.cpu_worker is not None
    with os.fdopen(answers_fd, "w") as out:
        json.dump([_in_fork(engine) for engine in work["engines"]], out)


if __name__ == "__main__":
    main()
