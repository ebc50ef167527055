"""A single stock vLLM engine: reads jobs as JSON on stdin, writes tokens as JSON on stdout.

Same model, dtype, block size, chunk size and thread count as the cluster under test, no connector:
what the cluster must reproduce. Input: {"engine": {...LLM arguments}, "core": int,
"jobs": [{"prompt": [ids], "params": {...SamplingParams}}], "batched": bool}.
"""

import json
import os
import sys


def main() -> None:
    work = json.load(sys.stdin)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    answers_fd = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to stdout: keep it for the answer
    os.sched_setaffinity(0, [work["core"]])
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(**work["engine"])

    def params_of(job: dict) -> SamplingParams:
        params = dict(job["params"])
        if "regex" in params:
            params["structured_outputs"] = StructuredOutputsParams(regex=params.pop("regex"))
        return SamplingParams(**params)

    groups = [work["jobs"]] if work.get("batched") else [[job] for job in work["jobs"]]
    answers = []
    for group in groups:
        prompts = [{"prompt_token_ids": job["prompt"]} for job in group]
        outputs = llm.generate(prompts, [params_of(job) for job in group], use_tqdm=False)
        answers += [
            {"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens, "finish": o.outputs[0].finish_reason}
            for o in outputs
        ]
    with os.fdopen(answers_fd, "w") as out:
        json.dump(answers, out)
    os._exit(0)  # no engine threads to wait for


if __name__ == "__main__":
    main()
