"""Question, statistics and pass rule of the annealing benchmark, written before it was run; and its runs.

**Question.** A merge is said to predict what annealing would give. By how much is it wrong, in nats a byte, once its
bias is corrected by real anneals of the same run, or of other runs?

**Runs.** A trunk is the demo's model at a constant learning rate after a warmup of 100 steps. At five points of it
(each fifth), and for decays over 10 % and 20 % of the steps up to there, of linear and of 1-sqrt shape, a branch is
resumed from the trunk's checkpoint and really annealed, over the same batches in the same order. Three seeds, and one
seed each with half and double the rate, a model three times as large, SGD with momentum, another corpus, and a mixture
of experts.

**Proxies.** At each point and for each span, evaluated offline on the same validation blocks from stored weights: the
live model; SMA, WMA, PMA's EMA, 1-sqrt and cosine equivalents, exponential averages of several half-lives; controls
(WMA and 1-sqrt with their coefficients reversed, 1-sqrt scrambled); 3, 5, 10 and 20 snapshots; Extra-Merge.

**Alignments.** *Matched*: window and decay cover the same steps and end together. *Forecast*: the window ends where
the decay begins, so the merge is known before it.

**Prediction.** ``live - rho * (live - merged)``, with one ``rho`` per span and shape, fitted (a) on the same run's
earlier branches only, from two on, or (b) on all branches of the other runs after their first quarter (leave one run
out).

**Statistics.** Over branches that end after the first quarter of their trunk: mean absolute error (MAE), signed bias,
worst case; recovered share ``(live - merged) / (live - annealed)``; the standard deviation of the annealed loss over
the three seeds as noise floor; rank agreement between merged and annealed loss over recipes. The first quarter is
reported apart.

**Pass rule.** Matched alignment, SMA over 10 snapshots, both (a) and (b): MAE <= 0.003 nats and no error above 0.010 at
a 10 % span, MAE <= 0.005 at 20 %.

**Second proxy.** Added when the first two seeds were done and no other trunk was: on them SMA over 10 snapshots did not
reach (a), and exponential averages whose half-life is about 5 % of the steps did. So the same rule is also applied to
them: half of a 10 % window for the 10 % span, 0.3 of a 20 % window for the 20 % span, 20 snapshots each. The trunks
other than those two tell whether that was luck.

**Weights.** Added when four trunks were done (the seeds and half the rate): what branches of the first quarter teach
about the later ones was the largest source of error in (a). So (a) is also applied with weights: an earlier branch
counts by the square of its step. The trunks other than those four tell whether that was luck. Beside it are reported:
the fit without weights, offsets, means of ratios, and both shapes together.

**Both.** Added when all trunks but ``larger`` and ``sgd`` were done: what a run that is given other runs' records does,
its own earlier branches by weight, and those of all other runs as if they were two (`bias.pooled_branches`). Not what
(a) or (b) ask for, but what a user gets; the same limits are applied to it.
"""

from dataclasses import dataclass

NUM_POINTS = 5
SPANS = (0.1, 0.2)
SHAPES = ("linear", "1-sqrt")
NUM_SNAPSHOTS = (3, 5, 10, 20)
# Blocks of 128 bytes kept back for validation.
NUM_VALIDATION_BLOCKS = 256


@dataclass(frozen=True)
class Trunk:
    """One run of the protocol: its length in steps, and how it differs from the demo's config."""

    num_steps: int = 2000
    overrides: tuple[str, ...] = ()
    points: tuple[int, ...] = tuple(range(1, NUM_POINTS + 1))
    spans: tuple[float, ...] = SPANS
    shapes: tuple[str, ...] = SHAPES

    @property
    def ends(self) -> list[int]:
        """Optimizer steps at which branches end."""
        return [self.num_steps * point // NUM_POINTS for point in self.points]


TRUNKS = {
    "seed0": Trunk(),
    "seed1": Trunk(overrides=("demo.seed=1",)),
    "seed2": Trunk(overrides=("demo.seed=2",)),
    "half_rate": Trunk(overrides=("model.learning_rate=1.5e-3",)),
    "double_rate": Trunk(overrides=("model.learning_rate=6e-3",)),
    "shakespeare": Trunk(overrides=("demo.corpus=shakespeare",)),
    "sgd": Trunk(overrides=("model.optimizer=sgd", "model.learning_rate=0.3", "model.weight_decay=0.0")),
    # Shorter, since a step takes three times as long.
    "larger": Trunk(1000, ("model.width=168", "model.num_heads=6")),
    "experts": Trunk(1000, ("model.num_experts=8",)),
    # A slice of seed0 that takes ten minutes on two cores: make benchmark-quick.
    "quick": Trunk(spans=SPANS[:1], shapes=SHAPES[:1]),
}
