"""The masked-LM loss of labels, by logits of labelled rows alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from fastmask import functional
from fastmask.hf.backbone import Backbone

IGNORED = -100


def masked_lm_loss(
    net: Backbone,
    input_ids: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | float | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""The mean cross-entropy of the labels, as a masked language model gives it of ``labels=``.

    .. math::
        \sum_{\text{labels}_i \ne -100} -\log p(\text{labels}_i \mid \text{input\_ids}) \Big/ n

    Where the head is linear only rows with a label go through it, one chunk of logits at a time. Every id is a
    prediction, the mask too, as in transformers. DistributedDataParallel goes around :class:`MaskedLM`, whose forward
    this is.

    Args:
        net: the model, in a Backbone.
        input_ids: [B, N] int32|int64, what the network sees.
        labels: [B, N] int64, -100 where there is none; of their own positions, for decoders too (nothing is shifted).
            One that is neither an id nor -100 gives NaN, where transformers raises an IndexError on a CPU.
        num_items_in_batch: n, the labels of the whole batch, of which this is a part (gradient accumulation), as
            transformers' Trainer counts them; by default those here.
        kwargs: passed to the model (``attention_mask=``).

    Returns:
        [] float32 (float64 of a float64 model), in nats. 0 where there is no label; transformers' is NaN then.

    Raises:
        TypeError, ValueError: net is no Backbone; labels of another shape or dtype.

    Example:
        >>> import torch, transformers
        >>> from fastmask.hf import Backbone, masked_lm_loss
        >>> config = transformers.BertConfig(
        ...     vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        ... )
        >>> net = Backbone(transformers.BertForMaskedLM(config)).eval()
        >>> ids, labels = torch.full((2, 16), 99), torch.full((2, 16), -100)
        >>> labels[:, 3] = 7
        >>> bool((masked_lm_loss(net, ids, labels) - net.model(ids, labels=labels).loss).abs() < 1e-5)
        True
    """
    if not isinstance(net, Backbone):
        raise TypeError(f"expected net to be a fastmask.hf.Backbone, received {type(net).__name__}; wrap it in one")
    head = net.linear_head()
    if head is None:
        logits = net(input_ids, **kwargs)
        return functional.masked_cross_entropy(
            logits, labels, denominator=num_items_in_batch, ignore_index=IGNORED
        ).loss
    logits = head.logits(net(input_ids, return_embeddings=True, **kwargs))
    return functional.linear_masked_cross_entropy(
        logits.scaled(logits.embeddings),
        logits.weight,
        labels,
        bias=logits.bias,
        denominator=num_items_in_batch,
        ignore_index=IGNORED,
        softcap=logits.softcap,
    ).loss


class MaskedLM(nn.Module):
    """A model of Hugging Face's whose forward is :func:`masked_lm_loss`: for Trainer, and for data parallelism.

    Args:
        net: the model, in a Backbone.

    Example:
        >>> import torch, transformers
        >>> from fastmask.hf import Backbone, MaskedLM
        >>> config = transformers.BertConfig(
        ...     vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        ... )
        >>> model = MaskedLM(Backbone(transformers.BertForMaskedLM(config)))
        >>> model(torch.full((2, 16), 99), labels=torch.full((2, 16), 7)).loss.backward()
    """

    def __init__(self, net: Backbone) -> None:
        super().__init__()
        self.net = net

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """transformers' output with nothing but the loss; arguments and errors as in :func:`masked_lm_loss`."""
        if labels is None:
            raise TypeError(
                f"expected labels, received input_ids and {sorted(kwargs)}; give MaskCollator(tokenizer, "
                "gives='labels'), or train a NonAutoregressiveWrapper around the Backbone"
            )
        loss = masked_lm_loss(self.net, input_ids, labels, num_items_in_batch, **kwargs)
        return MaskedLMOutput(loss=loss)
