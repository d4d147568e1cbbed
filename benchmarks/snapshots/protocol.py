"""Question, statistics and pass rule of the snapshots benchmark, written before it was run.

**Question.** A snapshot can be the weights at the end of an interval (a *point*) or their mean over the interval. Do
four means merge as well as ten points, at less than half the memory and checkpoint?

**Runs.** The trunks of the annealing benchmark, trained again with the same seeds, with the weights of every step kept.
At each of its five points, merges of windows over the last 5, 10, 20 and 40 % of the steps so far: points N = 3, 5, 10,
20 and means N = 2, 3, 4, 5, 10, evenly over the window, each under every rule; means N = 4 also from 2, 4 and 8 samples
an interval, N = 3 and 5 from 4 samples, and N = 4 in rows of bfloat16. Every merge is evaluated on the first 128 of the
256 validation blocks. Merges are compared with each other and with the live model on just these blocks, so the noise of
the validation set is the same on both sides. For a 40 % window, three seeds are really annealed over 40 % to each point
after the first quarter, in a linear shape; recovered share and bias for 10 and 20 % are against the records of the
annealing benchmark, with the gain on these blocks and the live loss of those records.

**Statistics.** For each trunk, over its points after the first quarter: mean loss of the merge above that of ten points
under the same rule and window; recovered share ``(live - merged) / (live - annealed)`` and bias ``merged - annealed``.
Rows in memory, and bytes of a checkpoint beside those of model and AdamW.

**Pass rule.** Means N = 4 of all steps are, for every rule and window, no worse than points N = 10 by more than 0.001
nats in the mean of each trunk, and no worse on average over trunks. Means N = 4 of 4 samples are within 0.001 nats of
those of all steps, in the same means. If it holds, means become the default.

**A long window.** Reported without a pass rule: ``qam`` over means against ``linear`` over points, for 40 %, as bias
against the real anneals.
"""

NUM_POINTS = (3, 5, 10, 20)
NUM_MEANS = (2, 3, 4, 5, 10)
# Number of means -> numbers of samples an interval.
SAMPLED = {3: (4,), 4: (2, 4, 8), 5: (4,)}
RULES = ("sma", "wma", "linear", "1-sqrt", "cosine", "ema", "qam")
WINDOWS = (0.05, 0.1, 0.2, 0.4)
NUM_BATCHES = 8  # of 16 blocks
LONG_SPAN = 0.4
LONG_SEEDS = ("seed0", "seed1", "seed2")
LIMIT = 0.001
FIRST_QUARTER = 0.25
