"""transformers' DiffusionGemma, its entropy-bound sampler on fastmask's operations.

``swap_sampler(model)`` is all that changes: ``generate`` then takes what it took and returns what it returned. Needs
the extra ``hf``, with transformers of at least 5.11.

One pass over the logits gives candidates and entropies. No softmax of their size is stored (on a CPU one of a chunk),
nothing of it is sorted, and nothing waits for the device. Candidates are equal in law to transformers', and a seed
gives other draws; of given candidates the same are accepted. What differs:

- entropies are float32, where transformers works in the logits' dtype (``generate`` makes them float32 itself);
- of positions with equal entropies the first is accepted first;
- a row of NaN gives the lowest id, and is not accepted; transformers raises where it reads the values.

The rest of ``generate`` stays transformers': the temperature, the argmax, the mean entropy by which it stops (values
are read there) and the softmax of self-conditioning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmask import functional
from fastmask._entropy_bound import accepted_positions

try:
    from transformers.models.diffusion_gemma import generation_diffusion_gemma
except ImportError as error:
    raise ImportError(
        f"expected transformers of at least 5.11 for fastmask.hf.diffusion_gemma, received: {error}; "
        "install it with pip install 'fastmask[hf]' 'transformers>=5.11'"
    ) from error

__all__ = ["EntropyBoundSampler", "swap_sampler"]


class EntropyBoundSampler(generation_diffusion_gemma.EntropyBoundSampler):
    """Accepts the candidates of the lowest entropies, as many as an entropy bound allows; random ids elsewhere.

    Arguments, methods and the mask of what was accepted are transformers'.

    Source: EB-Sampler (https://arxiv.org/abs/2505.24857), algorithm 1; transformers 5.24,
    generation_diffusion_gemma.py.

    Example:
        >>> config = generation_diffusion_gemma.EntropyBoundSamplerConfig(entropy_bound=0.1)
        >>> sampler = EntropyBoundSampler(config, canvas_length=3, vocab_size=2, max_denoising_steps=8)
        >>> logits = torch.tensor([[[99.0, 0.0], [0.0, 0.0], [0.0, 99.0]]])
        >>> sampler.accept_canvas(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]]), logits, 8)
        tensor([[0, 1, 1]])
        >>> logits[0, 2] = 0.0
        >>> sampler.accept_canvas(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]]), logits, 8)
        tensor([[0, 1, 7]])
    """

    accepted_token_mask: Tensor | None  # [B, N] bool, of the last accept_canvas

    def accept_canvas(
        self, current_canvas: Tensor, denoiser_canvas: Tensor | None, logits: Tensor, cur_step: int | Tensor
    ) -> Tensor:
        """Takes candidates where they are accepted.

        Args:
            current_canvas: [B, N] int64, the ids that the model saw.
            denoiser_canvas: [B, N] int64, candidates; None draws them here, from softmax(logits).
            logits: [B, N, V] floating point.
            cur_step: unused, as in transformers.

        Returns:
            [B, N] int64: candidates where ``accepted_token_mask``, else the current ids.

        Randomness: one seed of torch's generator of the device, where candidates are drawn.
        """
        if denoiser_canvas is None:
            sampled = functional.sample_tokens(logits, with_entropy=True)
            denoiser_canvas = sampled.ids
        else:  # for the entropies alone
            sampled = functional.sample_tokens(logits, temperature=0.0, with_entropy=True, seed=0)
        assert sampled.entropies is not None
        self.accepted_token_mask = accepted_positions(sampled.entropies, self.entropy_bound)
        return denoiser_canvas.where(self.accepted_token_mask, current_canvas)


def swap_sampler(model: Any) -> None:
    """``model.generate`` samples with fastmask from here on.

    Two methods of this one model are replaced, so that its class, and how it is loaded and saved, stay transformers'.

    Args:
        model: transformers' DiffusionGemmaForBlockDiffusion.

    Raises:
        TypeError: another model.

    Randomness: of each step one seed of torch's generator of the device, then the random ids as transformers draws
    them.

    Example:
        >>> import transformers  # doctest: +SKIP
        >>> model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(name)  # doctest: +SKIP
        >>> swap_sampler(model)  # doctest: +SKIP
        >>> model.generate(input_ids, max_new_tokens=256)  # doctest: +SKIP
    """
    if not isinstance(model, generation_diffusion_gemma.DiffusionGemmaGenerationMixin):
        raise TypeError(
            f"expected model to be a DiffusionGemmaForBlockDiffusion, received {type(model).__name__}; "
            "of a wrapper hand in the model that it wraps"
        )
    for name in ("_compiled_accept_canvas", "_compiled_renoise_canvas"):  # of an earlier generation
        model.__dict__.pop(name, None)
    # Parts of the model are bound, not the model, which would keep itself alive.
    model._prepare_sampler = partial(_prepare_sampler, model.config)
    model._denoising_step = partial(_denoising_step, model.model.decoder)


def _prepare_sampler(
    model_config: Any, generation_config: generation_diffusion_gemma.DiffusionGemmaGenerationConfig
) -> EntropyBoundSampler:
    return EntropyBoundSampler(
        config=generation_config.sampler_config,
        canvas_length=model_config.canvas_length,
        vocab_size=model_config.text_config.vocab_size,
        max_denoising_steps=generation_config.max_denoising_steps,
    )


def _denoising_step(
    decoder: Any,
    *,
    decoder_forward: Callable[..., Any],
    current_canvas: Tensor,
    argmax_canvas: Tensor,
    input_ids: Tensor,
    decoder_position_ids: Tensor,
    self_conditioning_logits: Tensor | None,
    mask_mapping: Any,
    finished_denoising: Tensor,
    cur_step: int,
    sampler: EntropyBoundSampler,
    logits_processor: Callable[..., Tensor],
    diffusion_stopping_criteria: Callable[..., Tensor] | None,
    **model_kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """transformers' method of that name, but for the candidates: the sampler draws them.

    model_kwargs: with the cache, which has had several names.
    """
    step = torch.full((), cur_step, dtype=torch.int32, device=current_canvas.device)  # an int would be compiled in
    torch.compiler.cudagraph_mark_step_begin()
    raw_logits = decoder_forward(
        decoder_input_ids=current_canvas,
        self_conditioning_logits=self_conditioning_logits,
        decoder_attention_mask=mask_mapping,
        decoder_position_ids=decoder_position_ids,
        **model_kwargs,
    ).logits
    logits = logits_processor(input_ids, raw_logits, cur_step=step)
    new_argmax_canvas = logits.argmax(dim=-1)
    # Cloned, since what a compiled method returns is overwritten by its next call.
    new_canvas = sampler.accept_canvas(current_canvas, None, logits, step).clone()
    new_canvas = sampler.renoise_canvas(new_canvas, step).clone()
    if diffusion_stopping_criteria is not None:
        if finished_denoising.any():  # before, there are no logits of another step
            assert self_conditioning_logits is not None
            new_argmax_canvas = argmax_canvas.where(finished_denoising[:, None], new_argmax_canvas)
            new_canvas = current_canvas.where(finished_denoising[:, None], new_canvas)
            logits = torch.where(finished_denoising[:, None, None], self_conditioning_logits, logits)
        finished_denoising |= diffusion_stopping_criteria(new_argmax_canvas, logits)
    return (
        new_canvas,
        new_argmax_canvas,
        logits.to(decoder.embed_tokens.weight.dtype),  # which the next step sees
        finished_denoising,
    )
