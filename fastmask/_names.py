"""Names of arguments that are nobody's: misspelt ones, and other libraries' names for ours.

Networks often take ``**kwargs`` and swallow what they do not know, so that such an argument would have no effect.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

# Our names, and what users of Hugging Face, diffusers, LLaDA, Dream, MDLM, MaskGIT and x-transformers' other wrappers
# write. A name stands at all it may mean; the method that is called decides.
_ELSEWHERE = {
    "start_temperature": ("temperature", "temp", "sampling_temperature", "softmax_temp", "sm_temp", "do_sample"),
    "generator_sample_temperature": ("temperature", "temp", "sample_temperature", "critic_temperature"),
    "choice_temperature": ("alg_temp", "choice_temp", "r_temp", "remasking_temperature"),
    "score": ("alg", "remasking", "remasking_strategy"),
    "entropy_bound": ("gamma", "eb_threshold"),
    "noise_level_scale": ("critic_noise_scale", "noise_scale"),
    "filter_thres": ("thres", "top_k", "topk", "topk_filter_thres"),
    "top_p": ("nucleus", "nucleus_p", "top_p_thres", "topp"),
    "forbidden": ("bad_words", "bad_words_ids", "banned_tokens", "forbidden_ids", "suppress_tokens"),
    "threshold": ("conf_threshold", "confidence_threshold", "prob_threshold"),
    "cfg_scale": ("cfg", "cond_scale", "guidance", "guidance_scale", "w"),
    "unconditional": ("negative_prompt", "negative_prompt_ids", "uncond", "unconditional_input_ids"),
    "block_length": ("block_len", "block_size"),
    "cache": ("kv_cache", "use_cache", "use_kv_cache"),
    "eos_id": ("eos", "eos_token", "eos_token_id", "stop_token_id", "stop_token_ids"),
    "commits": ("num_transfer_tokens", "tokens_per_step", "transfer_schedule"),
    "steps": (
        "denoising_steps", "diffusion_steps", "max_iter", "num_inference_steps", "num_iter", "num_sampling_steps",
        "num_steps", "n_steps", "sample_steps", "sampling_steps", "timesteps",
    ),
    "seq_len": (
        "gen_length", "length", "max_length", "max_new_tokens", "max_tokens", "new_tokens", "seq_length",
        "sequence_length",
    ),
    "batch_size": ("bsz", "n_samples", "num_images_per_prompt", "num_return_sequences", "num_samples"),
    "chunk_size": ("batch_size", "micro_batch_size"),
    "num_samples": ("mc_num", "n_samples", "num_mc_samples", "num_monte_carlo"),
    "prompt": ("input_ids", "inputs", "prefix", "prompt_ids", "prompts"),
    "prompt_mask": ("prompt_lens", "prompt_length", "prompt_padding_mask"),
    "x": ("ids", "input_ids", "inputs"),
    "tokens": ("ids", "input_ids", "inputs", "x"),
    "is_masked": ("label", "labels", "targets", "target_ids", "mask_positions", "masked_positions"),
    "masked_ids": ("corrupted_ids", "noised_ids", "noisy_ids"),
    "maskable": ("label_mask", "loss_mask", "pad_mask", "padding_mask", "special_tokens_mask"),
    "with_metrics": ("return_metrics", "return_accuracy"),
    "seed": ("random_seed", "rng"),
    "generator": ("random_seed", "rng", "seed"),
    "progress": ("callback", "callback_on_step_end", "disable_tqdm", "pbar", "show_progress", "verbose"),
    "return_trajectory": ("output_history", "return_all", "return_history", "return_intermediate_steps"),
    "cuda_graph": ("use_cuda_graph",),
}  # fmt: skip

# What else there is to say.
_REMEDIES = {
    "do_sample": "give start_temperature=0 for greedy decoding",
    "top_k": "give filter_thres=1 - (k - 0.5) / num_tokens",
    "topk": "give filter_thres=1 - (k - 0.5) / num_tokens",
    "alg": 'give score="confidence", "margin", "entropy" or "random"',
    "remasking": 'give score="confidence", "margin", "entropy" or "random"',
    "remasking_strategy": 'give score="confidence", "margin", "entropy" or "random"',
    "max_new_tokens": "give seq_len=, the prompt's positions included",
    "gen_length": "give seq_len=, the prompt's positions included",
    **dict.fromkeys(
        ("label", "labels", "targets", "target_ids"),
        "the clean ids are the targets; a collator's masks are is_masked= and masked_ids=",
    ),
    **dict.fromkeys(("random_seed", "rng", "seed"), "give generator=torch.Generator().manual_seed(seed)"),
}

# What nobody here knows by another name.
_ABSENT = {
    "attention_mask": "x-transformers' networks take mask= [B, N] bool; name what yours takes in its forward",
    **dict.fromkeys(("num_beams", "repetition_penalty"), "there is no such search; leave it out"),
}

_MIN_LETTERS, _MAX_EDITS = 6, 2  # shorter names are too near to each other


def refuse(arguments: Mapping[str, Any], net: Any, method: Callable[..., Any]) -> None:
    """Refuses names among the network's arguments that are meant for the method.

    What the network names in its forward, or one of its parts in its own, passes.

    Raises:
        TypeError: one is near to a name of the method, or another library's word for it.
    """
    if not arguments or torch.compiler.is_compiling():  # signatures cannot be traced
        return
    for name in arguments:
        remedy = _remedy(name, method)
        if remedy is not None and not _knows(net, name):
            raise TypeError(
                f"expected arguments of {method.__name__} or of the network, received {name}=; {remedy} (an argument "
                "of the network must stand in its forward's signature)"
            )


@functools.lru_cache(maxsize=1024)
def _remedy(name: str, method: Callable[..., Any]) -> str | None:
    """What to write for the name; None where it resembles nothing."""
    ours = [p.name for p in inspect.signature(method).parameters.values() if p.kind is not p.VAR_KEYWORD][1:]
    if name in _ABSENT:
        return _ABSENT[name]
    meant = [own for own in ours if name in _ELSEWHERE.get(own, ())]
    if meant:
        if name in _REMEDIES and ("seed" not in meant):
            return _REMEDIES[name]
        return f"give {meant[0]}="
    if len(name) < _MIN_LETTERS:
        return None
    distance, nearest = min((_edits(name, own), own) for own in ours)
    return f"give {nearest}=" if distance <= _MAX_EDITS else None


def _edits(a: str, b: str) -> int:
    """Letters to insert, delete or replace between two words (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != other))
    return row[-1]


def _knows(net: Any, name: str) -> bool:
    """Whether the network, or a module in it, has a parameter of that name beside its first, the ids."""
    parts = net.modules() if isinstance(net, nn.Module) else [net]
    return any(name in _names(getattr(part, "forward", part)) for part in parts)


def _names(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable of C
        return []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    first = next(iter(parameters), None)
    return named[1:] if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else named
