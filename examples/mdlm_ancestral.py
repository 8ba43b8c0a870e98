"""MDLM's ancestral sampling: each masked position is committed by a coin of its own, and sampled only there.

    python examples/mdlm_ancestral.py

    the law itself   0.83 nats a letter
      2 steps        2.25
      8 steps        1.22
     32 steps        0.96
    128 steps        0.84
    ...

In place of a trained network stands one that is exact, of letters that mostly count on: 3 4 5 6 ... Committing many
at once is then the only error, and it goes as the steps become many. Takes a few seconds on one core of a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from fastmask import functional as F

LETTERS, LENGTH = 8, 32
MASK = LETTERS
Network = Callable[[Tensor], Tensor | F.LinearLogits]


def ancestral_step(
    net: Network,
    ids: Tensor,
    is_masked: Tensor,
    log_probs: Tensor,
    ratio: float,
    next_ratio: float,
    *,
    mask_id: int,
    seed: Tensor | int,
    step: int,
) -> None:
    """From one mask ratio to the next, lower one, in place: Sahoo et al., https://arxiv.org/abs/2406.07524.

    A masked position stays so with probability next_ratio / ratio, which is s / t of the linear schedule; else it
    becomes a sample of the network.

    Args:
        net: ids to logits [B, N, V]; behind a linear head to ``F.LinearLogits(embeddings, weight, bias)``, of which
            only the committed rows then become logits.
        ids, is_masked, log_probs: [B, N] int64, bool, float32: what there is, and nats of each committed id.
    """
    committed = F.select_at_random(is_masked, 1.0 - next_ratio / ratio, seed=seed, step=step)
    # Waits for a GPU to count the rows; torch.nonzero_static(..., size=committed.numel()) does not.
    rows = committed.flatten().nonzero().squeeze(-1)
    out = F.Sampled(ids, log_probs)
    F.sample_tokens(net(ids), mask_id=mask_id, row_indices=rows, out=out, seed=seed, step=step)
    is_masked &= ~committed


def sample(net: Network, batch: int, steps: int, seed: Tensor | int) -> Tensor:
    """Sequences [B, N], from all masked to none."""
    ids = torch.full((batch, LENGTH), MASK)
    is_masked, log_probs = torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape)
    ratios = torch.linspace(1, 0, steps + 1).tolist()
    for step in range(steps):
        ancestral_step(
            net, ids, is_masked, log_probs, ratios[step], ratios[step + 1], mask_id=MASK, seed=seed, step=step
        )
    return ids


class Chain:
    """A Markov chain, and the exact probabilities of each masked letter by the nearest known ones on both sides."""

    def __init__(self) -> None:
        ones = torch.eye(LETTERS)
        self.transition = 0.75 * ones.roll(1, 1) + 0.15 * ones + 0.1 / LETTERS
        powers = [torch.full((LETTERS, LETTERS), 1.0 / LETTERS)]  # nothing known is as good as far away
        self.powers = torch.stack(powers + [self.transition.matrix_power(n) for n in range(1, LENGTH)])

    def __call__(self, ids: Tensor) -> Tensor:
        place, is_known = torch.arange(LENGTH), ids != MASK
        left = place.where(is_known, -1).cummax(dim=1).values.roll(1, 1)
        right = place.where(is_known, LENGTH).flip(1).cummin(dim=1).values.flip(1).roll(-1, 1)
        left[:, 0], right[:, -1] = -1, LENGTH
        from_left = (place - left).where(left >= 0, 0)
        to_right = (right - place).where(right < LENGTH, 0)
        known = ids.masked_fill(~is_known, 0)
        before = known.gather(1, left.clamp(min=0))
        behind = known.gather(1, right.clamp(max=LENGTH - 1))
        return self.powers[from_left, before].log() + self.powers.mT[to_right, behind].log()

    def nats(self, ids: Tensor) -> float:
        """Of a letter after the one before, in the mean."""
        return -self.transition[ids[:, :-1], ids[:, 1:]].log().mean().item()

    @property
    def entropy(self) -> float:
        """The same of the law itself."""
        return -(self.transition * self.transition.log()).sum(dim=1).mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args(arguments)

    chain = Chain()
    print(f"the law itself   {chain.entropy:.2f} nats a letter")
    for steps in (2, 8, 32, 128):
        ids = sample(chain, options.batch, steps, seed=0)
        print(f"{steps:3d} steps        {chain.nats(ids):.2f}")
    print(ids[0].tolist())


if __name__ == "__main__":
    main()
