"""What a server answers to fixed tokens: log-probabilities, and greedy text.

    python tools/ask_server.py SERVER --request request.json --jobs jobs.json

| server       | model                  | environment                                            |
|--------------|------------------------|--------------------------------------------------------|
| trainer      | checkpoint             | mqat's: the Megatron model that trains                 |
| reader       | Hugging Face directory | mqat's: what `mqat verify` runs, in float32            |
| transformers | Hugging Face directory | any with transformers and compressed-tensors           |
| vllm         | Hugging Face directory | vLLM's; only kernels that round inputs as in training  |
| vllm-default | Hugging Face directory | vLLM's; the kernels that it chooses                    |
| llama.cpp    | GGUF file              | one with llama-cpp-cffi                                |

A request has `windows` (token ids of each), `prompts` (likewise) and `new_tokens`. A job has `model`,
`answer` (the file to write) and `dtype`, and for some servers more. An answer has, of each window, the
natural logarithm of the probability of every token but the first (`logs`), and what follows each prompt
(`texts`); or `error`: why the server refused the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Tokens = Sequence[Sequence[int]]
Answer = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What every model is asked."""

    windows: Tokens
    prompts: Tokens
    new_tokens: int


@dataclass(frozen=True)
class Job:
    """A model to ask.

    Attributes:
        model: As the table above says.
        answer: File that is written.
        dtype: `float32` or `bfloat16`.
        noise: reader: relative noise on the input of every linear of the answer's `noisy`.
        kv_cache: vllm: dtype of keys and values.
    """

    model: str
    answer: str
    dtype: str = "float32"
    noise: float = 0.0
    kv_cache: str = "auto"


def ask_trainer(job: Job, request: Request) -> Answer:
    """The Megatron model that trains, of a checkpoint."""
    import torch
    from megatron.core import parallel_state

    from mqat.evaluation.generation import Limits, generate
    from mqat.evaluation.text_model import open_text_model

    parallel_state.destroy_model_parallel()  # of an earlier job
    precision = {"float32": "32", "bfloat16": "bf16"}[job.dtype]
    logs = []
    with open_text_model(Path(job.model), precision=precision) as found:
        for window in request.windows:
            tokens, places = torch.tensor([window]), torch.arange(len(window) - 1)
            rows = torch.zeros_like(places)
            scores, _ = found.score(tokens[:, :-1], rows, places, tokens[0, 1:, None])
            logs.append(scores[:, 0].tolist())
        limits = Limits(request.new_tokens, ignores_end=True)
        texts, _ = generate(found, request.prompts, limits)
    return {"logs": logs, "texts": [text.tokens for text in texts]}


def ask_reader(job: Job, request: Request) -> Answer:
    """The reader of `mqat verify`; it continues no text, for which it takes minutes."""
    import torch

    from mqat.verify.verify import open_export

    decoder = open_export(Path(job.model), keeps_weights=True)
    found: Answer = {"logs": [], "noisy": [], "texts": []}
    for name, noise in {"logs": 0.0, "noisy": job.noise}.items():
        for window in request.windows:
            tokens = torch.tensor([window])
            logits = decoder.logits(tokens[:, :-1], noise)[0].log_softmax(-1)
            found[name].append(logits.gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return found


def ask_transformers(job: Job, request: Request) -> Answer:
    """As users load it."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, job.dtype)
    found = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()
    logs, texts = [], []
    with torch.no_grad():
        for window in request.windows:
            tokens = torch.tensor([window])
            logits = found(tokens[:, :-1]).logits[0].float().log_softmax(-1)
            logs.append(logits.gather(1, tokens[0, 1:, None])[:, 0].tolist())
        count = request.new_tokens
        for prompt in request.prompts:
            text = found.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=count, min_new_tokens=count
            )
            texts.append(text[0, len(prompt) :].tolist())
    return {"logs": logs, "texts": texts}


def ask_vllm(job: Job, request: Request) -> Answer:
    """On a CPU, in this process."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        job.model, dtype=job.dtype, max_model_len=1024, enforce_eager=True, max_num_seqs=4,
        enable_prefix_caching=False, skip_tokenizer_init=True, kv_cache_dtype=job.kv_cache,
    )  # fmt: skip
    always = {"temperature": 0.0, "detokenize": False}
    of_windows = SamplingParams(max_tokens=1, prompt_logprobs=0, **always)
    of_prompts = SamplingParams(max_tokens=request.new_tokens, ignore_eos=True, **always)
    scored, told = (
        llm.generate([{"prompt_token_ids": list(row)} for row in rows], how, use_tqdm=False)
        for rows, how in ((request.windows, of_windows), (request.prompts, of_prompts))
    )
    logs = [
        [at[token].logprob for token, at in zip(row[1:], found.prompt_logprobs[1:], strict=True)]
        for row, found in zip(request.windows, scored, strict=True)
    ]
    del llm
    cleanup_dist_env_and_memory()
    return {"logs": logs, "texts": [list(found.outputs[0].token_ids) for found in told]}


def prepare_vllm(*, trained_kernels: bool) -> None:
    """Settings of vLLM, before it is imported, and what its CPU build lacks.

    With `trained_kernels` it leaves out the kernels for AMX tiles that round inputs otherwise than the
    directory says: that of INT8 takes a step per token in the place of the static one, that of FP8 does
    not round them at all, and that of INT4 rounds them to INT8.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
                   "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    if trained_kernels:
        os.environ |= {"VLLM_CPU_INT4_W4A8": "0",
                       "VLLM_DISABLED_KERNELS": "CPUFp8PerTensorScaledMMLinearKernel"}  # fmt: skip
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear.scaled_mm import cpu, pytorch

    _custom_ops.scaled_fp8_quant, torch._scaled_mm = _scaled_fp8_quant, _scaled_mm
    # An activation that rounds its output for the next linear: another kernel that is not there.
    pytorch.PerTensorTorchFP8ScaledMMLinearKernel.input_quant_key = lambda self: None
    if trained_kernels:
        cpu.check_cpu_sgl_kernel = lambda *_: False


def _scaled_fp8_quant(
    input: Any, scale: Any = None, num_token_padding: int | None = None, scale_ub: Any = None,
    use_per_token_if_dynamic: bool = False, output: Any = None, group_shape: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Inputs to FP8, which vLLM's CPU build calls a kernel for that it does not have."""
    import torch

    if scale is None:
        amax = input.abs().float()
        amax = amax.amax(-1, keepdim=True) if use_per_token_if_dynamic else amax.amax()
        scale = (amax / 448).clamp(min=1 / (448 * 512))
    codes = (input.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    missing = max((num_token_padding or 0) - len(codes), 0)
    if missing:
        codes = torch.cat([codes, codes.new_zeros(missing, codes.shape[1])])
        if scale.dim() == 2:
            scale = torch.cat([scale, scale.new_ones(missing, 1)])
    return codes, scale


def _scaled_mm(
    a: Any, b: Any, *, scale_a: Any, scale_b: Any, out_dtype: Any, bias: Any = None
) -> Any:
    """The product of FP8 codes, for which torch takes minutes on CPUs without units for them."""
    product = (a.float() @ b.float()) * (scale_a * scale_b)
    return (product if bias is None else product + bias).to(out_dtype)


def ask_llama_cpp(job: Job, request: Request) -> Answer:
    """By llama.cpp's C functions: the package's own classes give no logits."""
    import numpy as np
    from llama._llama_cpp_cpu import ffi, lib

    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(job.model.encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 1024
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = lib.GGML_TYPE_F32
    context = lib.llama_init_from_model(model, settings)
    if ffi.NULL in (model, context):
        raise ValueError(f"llama.cpp does not load {job.model}")
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def logits(tokens: Sequence[int], first: int) -> Any:
        """Of tokens behind `first` others, [tokens, vocabulary]; behind none, a new text begins."""
        if not first:
            lib.llama_kv_self_clear(context)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, first + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert lib.llama_decode(context, batch) == 0, "llama_decode failed"
        lib.llama_batch_free(batch)
        data = ffi.buffer(lib.llama_get_logits(context), 4 * size * len(tokens))
        return np.frombuffer(data, np.float32).reshape(-1, size).astype(np.float64)

    logs, texts = [], []
    for window in request.windows:
        scores = logits(window[:-1], 0)
        peaks = scores.max(-1)
        totals = peaks + np.log(np.exp(scores - peaks[:, None]).sum(-1))
        logs.append([float(s[t] - n) for s, t, n in zip(scores, window[1:], totals, strict=True)])
    for prompt in request.prompts:
        text = [int(logits(prompt, 0)[-1].argmax())]
        while len(text) < request.new_tokens:
            text.append(int(logits(text[-1:], len(prompt) + len(text) - 1)[-1].argmax()))
        texts.append(text)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return {"logs": logs, "texts": texts}


SERVERS: dict[str, Callable[[Job, Request], Answer]] = {
    "trainer": ask_trainer, "reader": ask_reader, "transformers": ask_transformers, "vllm": ask_vllm,
    "vllm-default": ask_vllm, "llama.cpp": ask_llama_cpp,
}  # fmt: skip


def main() -> None:
    """Asks every model, and writes every answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("--request", type=Path, required=True)
    parser.add_argument("--jobs", type=Path, required=True, help="a list of `Job`")
    args = parser.parse_args()
    if args.server.startswith("vllm"):
        prepare_vllm(trained_kernels=args.server == "vllm")
    request = Request(**json.loads(args.request.read_text("utf-8")))
    for job in (Job(**job) for job in json.loads(args.jobs.read_text("utf-8"))):
        try:
            answer = SERVERS[args.server](job, request)
        except (ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        Path(job.answer).write_text(json.dumps(answer), "utf-8")
        gc.collect()


if __name__ == "__main__":
    main()
