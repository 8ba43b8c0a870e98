"""The random streams of fastmask: one table, read by the reference and by the kernels.

A Philox counter is four 32-bit words (docs/randomness.md):

    c0  tile, sub-tile or element of the vocabulary (0 where there is none)
    c1  position in the sequence (0 where there is none)
    c2  global sample index: sample_offset + row (0 where a draw is shared by the batch)
    c3  stream * 2**24 + step

so two draws share a number only if they share stream, step, sample, position and element.
"""

STEP_BITS = 24

TIMES = 1  # word 0: t of one sequence
STRATUM = 2  # word 0: the offset that all stratified times share
COINS = 3  # word 0: the no-replace coin, word 1: the random-token coin, shared by the batch
KEYS = 4  # word 0: selection key, words 1 and 2: random id (64 bits), word 3: Bernoulli uniform;
#           gate="token" takes the one of words 0 and 3 that chose no mask
TILE_RACE = 5  # words 0 and 1: one 64-bit uniform, as in the two races below
SUB_TILE_RACE = 6
ELEMENT_RACE = 7
SCORE_NOISE = 8  # words 0 and 1: one 64-bit uniform
SELECTION = 9  # words 0 and 1: one 64-bit uniform

# The vocabulary's hierarchy is part of what a seed means, not a tuning knob.
TILE = 4096
SUB_TILE = 64
