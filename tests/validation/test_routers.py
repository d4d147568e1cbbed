"""Routers of the merge against the live ones: agreement and load, logged, for modules by pattern or by a function."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from merge_callback import MergeCallback, Parts, Routers
from merge_callback.apps.demo.model import ByteGPT
from tests.helpers.toys import Toy, assert_same_training, batches, fit, make, same

NAMES = ("agreement", "jaccard", "entropy", "entropy_live", "violation", "violation_live")
VALIDATION = batches(24, 8, shuffle=False, seed=1)


class Mixture(Toy):
    """Two layers of three experts, of which a sample uses two."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.router = nn.Linear(6, 3)
        self.second = nn.ModuleDict({"router": nn.Linear(6, 3)})
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.scores = {}

    def forward(self, x):
        for name, router in (("first", self.router), ("second", self.second["router"])):
            self.scores[name] = scores = router(x)
            weights, chosen = scores.softmax(-1).topk(2)
            outputs = torch.stack([expert(x) for expert in self.experts], 1)
            picked = outputs.gather(1, chosen[..., None].expand(-1, -1, 6))
            x = x + (weights[..., None] * picked).sum(1)
        return super().forward(x)


def twin(module, states):
    """The six numbers of both routers over all of the validation, counted sample by sample in plain Python."""
    chosen = []
    for state in states:
        module.load_state_dict(state)
        module.eval()
        with torch.no_grad():
            for x, _ in VALIDATION:
                module(x)
                chosen.append({name: s.topk(2).indices.tolist() for name, s in module.scores.items()})
    half = len(chosen) // 2
    found = {}
    for name in ("first", "second"):
        merged, live = ([set(pair) for each in part for pair in each[name]] for part in (chosen[:half], chosen[half:]))
        pairs = list(zip(merged, live, strict=True))
        loads = [
            [sum(expert in one for one in side) / (2 * len(side)) for expert in range(3)] for side in (merged, live)
        ]
        entropies = [-sum(share * math.log(share) for share in load if share) / math.log(3) for load in loads]
        violations = [max(load) * 3 - 1 for load in loads]
        found[name] = [
            sum(one == other for one, other in pairs) / len(pairs),
            sum(len(one & other) / len(one | other) for one, other in pairs) / len(pairs),
            *entropies,
            *violations,
        ]
    return found


def scores_of(module):
    """What a function of the user's returns."""
    return module.scores


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    callback = MergeCallback(
        2, 4, parts=Parts(routers=Routers("*router", num_active=2, num_batches=99, per_layer=True))
    )
    fitted = fit(make(Mixture, learning_rate=0.2), tmp_path_factory.mktemp("run"), callback, validation=VALIDATION)
    return fitted, callback


@pytest.mark.slow
def test_what_is_logged_is_what_plain_counting_finds(run):
    fitted, callback = run
    live = {name: tensor.clone() for name, tensor in fitted.module.state_dict().items()}
    expected = twin(make(Mixture), [callback.merged_state_dict(), live])
    metrics = fitted.epoch_metrics[-1]
    for name, layer in (("router", "first"), ("second.router", "second")):
        found = [float(metrics[f"merge/router_{each}/{name}"]) for each in NAMES]
        assert found == pytest.approx(expected[layer], abs=1e-6)
    means = [(one + other) / 2 for one, other in zip(*expected.values(), strict=True)]
    assert [float(metrics[f"merge/router_{each}"]) for each in NAMES] == pytest.approx(means, abs=1e-6)
    # Otherwise there would be nothing to see.
    assert 0 < expected["first"][0] < 1


def test_a_function_that_returns_the_scores_says_the_same(run, tmp_path):
    fitted, _ = run
    callback = MergeCallback(2, 4, parts=Parts(routers=Routers(scores_of, num_active=2, num_batches=99)))
    module = make(Mixture, learning_rate=0.2)
    again = fit(module, tmp_path, callback, validation=VALIDATION)
    assert "validation_step" not in vars(module)
    for name in NAMES:
        assert again.logged(f"merge/router_{name}") == fitted.logged(f"merge/router_{name}")
        assert f"merge/router_{name}/first" not in again.epoch_metrics[-1]


def test_training_is_bit_identical(run, tmp_path):
    fitted, _ = run
    without = fit(make(Mixture, learning_rate=0.2), tmp_path, validation=VALIDATION)
    assert_same_training(without, fitted)
    assert not any(module._forward_hooks for module in fitted.module.modules())


def test_routers_that_stay_live_agree_unless_their_inputs_differ(tmp_path):
    # Of the first one the inputs are the data.
    routers = Routers("router", num_active=2, per_layer=True)
    callback = MergeCallback(2, 4, parts=Parts(exclude=["router.*"], routers=routers))
    fitted = fit(make(Mixture, learning_rate=0.2), tmp_path, callback)
    assert {value for _, value in fitted.logged("merge/router_agreement")} == {1.0}
    assert same(
        dict(fitted.module.router.state_dict()),
        {name: callback.merged_state_dict()[f"router.{name}"] for name in ("weight", "bias")},
    )


def test_a_router_behind_another_one_is_left_out_with_a_warning_where_it_sees_other_tokens(tmp_path):
    class Hierarchical(Mixture):
        def forward(self, x):
            self.router(x)
            chosen = self.out(x).argmax(-1) == 0
            self.second["router"](x[chosen])
            return super(Mixture, self).forward(x + chosen[:, None])

    routers = Routers("*router", num_active=2, per_layer=True)
    with pytest.warns(UserWarning, match=r"second\.router saw other tokens in the merge than in the live model"):
        run = fit(make(Hierarchical, learning_rate=0.2), tmp_path, MergeCallback(2, 4, parts=Parts(routers=routers)))
    whole = [step for step, _ in run.logged("merge/router_agreement")]
    behind = [step for step, _ in run.logged("merge/router_agreement/second.router")]
    assert [step for step, _ in run.logged("merge/router_agreement/router")] == whole
    assert len(behind) < len(whole) == 6


def test_only_the_first_batches_are_looked_at(tmp_path):
    calls = []

    def count(module):
        calls.append(module.scores["first"].shape[0])
        return module.scores

    fit(
        make(Mixture),
        tmp_path,
        MergeCallback(4, 4, parts=Parts(routers=Routers(count, num_active=2, num_batches=2))),
        max_steps=4,
    )
    # Two batches by the merge, two by the live model.
    assert calls == [8, 8, 8, 8]


class Wide(Toy):
    """A layer that is no router."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        self.pair(x)
        return super().forward(x)


class Pair(nn.Module):
    """Returns two tensors."""

    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("*.router", r"Routers\('\*\.router'\) fits no module; there are inner, tied"),
        ("pair", r"pair must return the scores of its experts, \[..., num_experts\], got tuple; a function may return"),
        ("accuracy", r"the validation did not call accuracy"),
        (lambda module: {}, r"the validation did not call any router"),
    ],
)
def test_what_is_no_router_is_refused_by_name(tmp_path, modules, message):
    callback = MergeCallback(4, 4, parts=Parts(routers=Routers(modules, num_active=2)))
    module = make(Wide)
    module.accuracy = nn.Identity()
    module.validation_step = lambda batch, batch_idx: module.log(
        "val_loss", F.cross_entropy(module(batch[0]), batch[1])
    )
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, callback, max_steps=8)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="num_active must be >= 1, got 0"):
        Routers("*", num_active=0)
    with pytest.raises(ValueError, match="num_batches must be >= 1, got 0"):
        Routers("*", num_active=1, num_batches=0)
    with pytest.raises(TypeError, match=r"modules must be a pattern of names or a list of them, got 3"):
        Routers(3, num_active=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"routers must be a Routers or None, got '\*'"):
        Parts(routers="*")  # type: ignore[arg-type]


class Bytes(torch.utils.data.Dataset):
    """Blocks of bytes."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.randint(97, 123, (9,), generator=torch.Generator().manual_seed(index))


@pytest.mark.slow
def test_the_routers_of_the_demos_mixture_are_found_and_those_left_out_of_the_merge_are_live(tmp_path):
    options = {"context": 8, "dropout": 0.0, "learning_rate": 0.01, "warmup_steps": 2, "weight_decay": 0.0}
    torch.manual_seed(0)
    model = ByteGPT(num_layers=2, width=16, num_heads=2, num_experts=4, **options)
    routers = Routers("*.router", num_active=2)
    callbacks = [
        MergeCallback(2, 4, parts=Parts(routers=routers)),
        MergeCallback(2, 4, parts=Parts(exclude="*.router.*", routers=routers), name="kept"),
    ]
    loader = DataLoader(Bytes(), 8)
    run = fit(model, tmp_path, *callbacks, train=loader, validation=loader)
    metrics = run.epoch_metrics[-1]
    assert 0 < metrics["merge/router_agreement"] < 1
    # Where the routers are the same, only their inputs differ.
    assert metrics["merge_kept/router_agreement"] > metrics["merge/router_agreement"]
    assert 0 < metrics["merge/router_entropy"] <= 1
    live, kept = run.module.state_dict(), callbacks[1].merged_state_dict()
    names = [name for name in live if ".router." in name]
    assert len(names) == 2
    assert all(torch.equal(live[name], kept[name]) for name in names)
    assert not any(torch.equal(live[name], callbacks[0].merged_state_dict()[name]) for name in names)
