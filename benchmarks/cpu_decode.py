"""Decoding on the CPU beside transformers' `generate` (torch): same weights, dtype and prompts.

    python benchmarks/cpu_decode.py --model FILE.gguf --text TEXT --output benchmarks/NAME.json

Decode speed is that of the tokens after the first; the prefill's time is that of the first token.
Compilation is not counted on either side (transformers has none), and each figure is the median of
the repetitions, which alternate between the two.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time

import numpy as np
import script
import torch
import transformers

import quantspec_jax as qs
from quantspec_jax.bench import record
from quantspec_jax.models.parameters import flatten

HF_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}
HF_PARTS = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    ".kernel": "_proj.weight",
    ".q_proj": ".self_attn.q_proj",
    ".k_proj": ".self_attn.k_proj",
    ".v_proj": ".self_attn.v_proj",
    ".o_proj": ".self_attn.o_proj",
    ".gate_proj": ".mlp.gate_proj",
    ".up_proj": ".mlp.up_proj",
    ".down_proj": ".mlp.down_proj",
}
CONFIGS = {
    "autoregressive, kv full": {"mode": "autoregressive", "kv": "full"},
    "autoregressive, kv int8": {"mode": "autoregressive", "kv": "int8"},
    "quantspec, gamma 4": {"mode": "quantspec", "gamma": 4},
    "quantspec, gamma auto": {"mode": "quantspec"},
}


def ours(model: qs.Model, prompt: list[int], new: int, options: dict) -> tuple[float, float, float]:
    """(prefill seconds, decode tokens a second, acceptance)."""
    config = qs.GenerateConfig(
        max_new_tokens=new, ignore_eos=True, rounds_per_chunk=1024, **options
    )
    stats = qs.generate(model, [prompt], config).stats[0]
    rate = stats["acceptance_rate"]
    return stats["prefill_seconds"], stats["decode_tokens_per_second"], rate


def theirs(model, prompt: list[int], new: int) -> tuple[float, float, None]:
    """The same of transformers' greedy `generate`."""
    ids = torch.tensor([prompt])
    seconds = []
    for number in (1, new):
        begin = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids, max_new_tokens=number, min_new_tokens=number, do_sample=False, use_cache=True
            )
        seconds.append(time.perf_counter() - begin)
    return seconds[0], (new - 1) / (seconds[1] - seconds[0]), None


def torch_twin(model: qs.Model) -> torch.nn.Module:
    """transformers' Llama with the same weights."""
    config = model.config
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_context,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    state = {}
    for path, array in flatten(model.params).items():
        name = HF_NAMES.get(path) or "model." + path
        for ours, theirs in HF_PARTS.items():
            name = name.replace(ours, theirs)
        values = np.array(array)
        state[name] = torch.from_numpy(values.T.copy() if path.endswith("kernel") else values)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    peer.load_state_dict(state)
    return peer.eval()


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser, "of the Llama family, without biases")
    script.add_text(parser)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512, 4000])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    return parser


def main() -> int:
    args = make_parser().parse_args()
    model = qs.load(args.model, dtype="float32")
    peer = torch_twin(model)
    rows, new = [], args.new_tokens
    for length in args.prompt_tokens:
        prompt = script.tokens(model, args.text, length)
        runs = {"transformers": functools.partial(theirs, peer, prompt, new)}
        for name, options in CONFIGS.items():
            runs[name] = functools.partial(ours, model, prompt, new, options)
        for run in runs.values():
            run()  # compiles, warms up
        results = {name: [] for name in runs}
        for _ in range(args.repeat):
            for name, run in runs.items():
                results[name].append(run())
        for name, result in results.items():
            prefill, decode, rate = zip(*result, strict=True)
            row = {
                "prompt_tokens": length,
                "new_tokens": new,
                "what": name,
                "prefill_seconds": statistics.median(prefill),
                "decode_tokens_per_second": statistics.median(decode),
                "acceptance_rate": rate[0],
            }
            rows.append(script.show(row))
    script.write(__file__, args, rows, model=record.model_name(args.model), dtype="float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
