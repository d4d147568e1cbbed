"""Objects show the call that made them, and what looks like a mistake is answered with what to write."""

import copy
import pickle

import pytest

import merge_callback
from merge_callback import MergeCallback

CALLS = [
    "MergeCallback()",
    "MergeCallback(100, 5, merges={'sma': 'sma', 'late': Window(rule='wma', span_steps=None, span=0.05)})",
    "MergeCallback(merges=Ema(half_life_steps=500, half_life=None))",
    "MergeCallback(storage=SnapshotMemory(place='cpu', in_checkpoints=True))",
    "Merger(every_n_steps=10, start='any')",
    "MergedCheckpoint(MergeCallback(), at='stable_end')",
    "AnnealBranch(span=0.1, shape='linear')",
    "SpikeRecovery(MergeCallback(num_snapshots=3))",
    "LiveAndMergedBar('val_loss', refresh_rate=25)",
    "Window(rule='sma', span_steps=None, span=0.1)",
    "Ema(half_life_steps=None, half_life=0.05)",
    "PowerEma(sigma_rel=0.1)",
    "Extrapolate(rule='sma', amount=0.25, gap=0.1, gap_steps=None)",
    "Parts(include='*lora*', exclude=(), routers=None)",
    "Routers(modules=('*router*',), num_active=2, num_batches=4, per_layer=False)",
    "SnapshotDirectory(path='here', strict=False, in_checkpoints=True)",
    "SpikeDetector(threshold=3.0, patience=4, window=100)",
]
NAMES = {name: getattr(merge_callback, name) for name in merge_callback.__all__}


def test_every_public_class_is_tried():
    classes = {name for name, found in NAMES.items() if isinstance(found, type)}
    assert {call.partition("(")[0] for call in CALLS} | {"SnapshotMemory"} == classes


@pytest.mark.parametrize("call", CALLS)
def test_an_object_shows_the_call_that_makes_it_again(call):
    made = eval(call, NAMES)
    assert repr(made) == call
    assert repr(eval(repr(made), NAMES)) == call
    assert repr(copy.deepcopy(made)) == call
    assert repr(pickle.loads(pickle.dumps(made))) == call


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ("Ema(0.05)", TypeError, "takes 1 positional argument but 2 were given"),
        ("Window(0.1)", TypeError, r"by name: Window\(span=0.1\) is a share .*; got 0.1"),
        ('MergeCallback(merges={"sma", "wma"})', TypeError, "several merges must be a mapping of names"),
        ("MergeCallback(decay=0.999)", TypeError, r"MergeCallback takes no decay=; .* write merges=Ema\("),
        ('MergeCallback(monitor="m")', TypeError, r"no monitor=; .* write MergedCheckpoint\(callback, monitor="),
        ('MergeCallback(calibration="priors")', ValueError, "must be 'prior' or a file .*'./priors'"),
        ("Merger(decay=0.999)", TypeError, "Merger takes no decay="),
    ],
)
def test_what_looks_like_a_mistake_is_answered_with_what_to_write(call, error, said):
    with pytest.raises(error, match=said):
        eval(call, NAMES)


def test_records_in_a_file_whose_name_is_like_prior_have_a_path(tmp_path):
    assert MergeCallback(calibration=str(tmp_path / "priors")).calibration == str(tmp_path / "priors")
    assert MergeCallback(calibration="./priors").calibration == "./priors"
    assert MergeCallback(calibration="prior").calibration == "prior"
