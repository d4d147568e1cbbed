"""Lines and planes through checkpoints: where points lie, what they are made of, and what they are worth."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

import merge_callback
from merge_callback.apps.landscape import barycentric, corners, distances, draw, line, plane
from merge_callback.apps.landscape import run as run_command
from merge_callback.checkpoints.read import open_checkpoint
from tests.helpers.toys import Toy, batches, make

CONF = Path(merge_callback.__file__).parent / "apps" / "commands" / "groups" / "landscape"
SILENT = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Three checkpoints of one model, and their states."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for seed, name in enumerate(NAMES):
        module = make(Toy)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        torch.save({"state_dict": module.state_dict()}, folder / f"{name}.ckpt")
        found[name] = {key: value.clone() for key, value in module.state_dict().items()}
    return folder, found


def config(states, output, which, names=NAMES, **changes):
    base = OmegaConf.to_container(OmegaConf.load(CONF / "line.yaml"))
    if which == "plane":
        base |= OmegaConf.to_container(OmegaConf.load(CONF / "plane.yaml"))
        del base["defaults"]
    base |= {"checkpoints": {name: str(states[0] / f"{name}.ckpt") for name in names}, "output": str(output)}
    toy = {"_target_": "hydra.utils.get_class", "path": "tests.helpers.toys.Toy"}
    return OmegaConf.create(
        {
            "model": {"_target_": "tests.helpers.toys.make", "toy_class": toy},
            "data": {"_target_": "tests.helpers.toys.batches", "shuffle": False},
            "trainer": {"_target_": "lightning.pytorch.Trainer", "enable_model_summary": False},
            "landscape": base | {"num_points": 3} | changes,
        }
    )


def flat(state):
    parameters = [value for name, value in state.items() if value.is_floating_point() and "running" not in name]
    return torch.cat([value.flatten().double() for value in parameters]).numpy()


def test_distances_are_those_of_the_weights(states):
    folder, found = states
    opened = [open_checkpoint(folder / f"{name}.ckpt") for name in NAMES]
    vectors = [flat(found[name]) for name in NAMES]
    expected = [[np.linalg.norm(one - other) for other in vectors] for one in vectors]
    np.testing.assert_allclose(distances(opened), expected, rtol=1e-6)


def test_a_place_on_the_plane_is_as_far_from_the_corners_as_its_weights_are(states):
    vectors = [flat(states[1][name]) for name in NAMES]
    sides = [[float(np.linalg.norm(one - other)) for other in vectors] for one in vectors]
    points = corners(sides)
    for place in plane(sides, 4, 0.5):
        there = sum(value * vector for value, vector in zip(place.coefficients, vectors, strict=True))
        assert sum(place.coefficients) == pytest.approx(1)
        for point, vector in zip(points, vectors, strict=True):
            expected = math.dist(point, (place.x, place.y))
            assert np.linalg.norm(there - vector) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_corners_are_their_own_weights_and_the_mean_is_a_third_of_each():
    points = corners([[0, 3, 4], [3, 0, 5], [4, 5, 0]])
    for index, point in enumerate(points):
        assert barycentric(points, *point) == pytest.approx([float(index == other) for other in range(3)])
    assert barycentric(points, 1, 4 / 3) == pytest.approx([1 / 3] * 3)


def test_the_grid_covers_the_triangle_with_its_margin():
    places = plane([[0, 3, 4], [3, 0, 5], [4, 5, 0]], 3, 0.5)
    assert sorted({place.x for place in places}) == [-1.5, 1.5, 4.5]
    assert sorted({place.y for place in places}) == [-2.0, 2.0, 6.0]
    assert len(places) == 9


def test_a_line_goes_from_checkpoint_to_checkpoint_and_on():
    places = line([[0, 2, 9], [2, 0, 8], [9, 8, 0]], 3, 0.1)
    assert [place.x for place in places] == pytest.approx([-1, 0, 1, 2, 6, 10, 11])
    expected = [(1.5, -0.5, 0), (1, 0, 0), (0.5, 0.5, 0), (0, 1, 0), (0, 0.5, 0.5), (0, 0, 1), (0, -0.125, 1.125)]
    assert [place.coefficients for place in places] == [pytest.approx(each) for each in expected]
    assert len(line([[0, 2], [2, 0]], 5, 0)) == 5


@pytest.mark.parametrize("kind", ["line", "plane"])
@pytest.mark.sample(1)
def test_values_are_those_of_the_validation_of_the_weighted_sums(states, tmp_path, capsys, kind):
    run_command(config(states, tmp_path, kind, limit_batches=2))
    record = json.loads((tmp_path / f"{kind}.json").read_text())
    found = states[1]
    trainer = Trainer(**SILENT, limit_val_batches=2)
    for point in record["points"]:
        pairs = list(zip(point["coefficients"], NAMES, strict=True))
        state = dict(found["third"])
        for key, value in state.items():
            if value.is_floating_point():
                state[key] = sum(c * found[name][key].double() for c, name in pairs).float()
        model = make(Toy)
        model.load_state_dict(state)
        (expected,) = trainer.validate(model, batches(shuffle=False), verbose=False)
        assert point["metrics"] == pytest.approx(expected, rel=1e-4)
    printed = capsys.readouterr().out
    best = min(point["metrics"]["val_loss"] for point in record["points"])
    assert f"Best val_loss: {best:.4f} at " in printed
    assert (tmp_path / f"{kind}.png").exists()
    axes = draw(record).axes[0]
    marks = {text.get_text() for text in axes.texts}
    assert marks == ({*NAMES} if kind == "line" else {*NAMES, "their mean"})


def test_the_checkpoints_themselves_have_the_values_that_they_have_alone(states, tmp_path):
    _, found = states
    named = {}
    for place, name in enumerate(NAMES):
        # Statistics that differ from one to the other, as in training.
        statistics = {
            "norm.running_mean": torch.full((6,), 0.1 * place),
            "norm.running_var": torch.full((6,), 1.0 + place),
        }
        named[name] = found[name] | statistics
        torch.save({"state_dict": named[name]}, tmp_path / f"{name}.ckpt")
    run_command(config((tmp_path, named), tmp_path, "line", margin=2.0))
    record = json.loads((tmp_path / "line.json").read_text())
    trainer = Trainer(**SILENT, limit_val_batches=8)
    for place, name in enumerate(NAMES):
        (point,) = [p for p in record["points"] if p["coefficients"] == [float(place == i) for i in range(3)]]
        model = make(Toy)
        model.load_state_dict(named[name])
        (expected,) = trainer.validate(model, batches(shuffle=False), verbose=False)
        assert point["metrics"] == pytest.approx(expected, rel=1e-5)


def test_points_without_a_number_are_null_and_never_the_best(states, tmp_path, capsys):
    run_command(config(states, tmp_path, "line", margin=1e14))
    record = json.loads((tmp_path / "line.json").read_text())
    values = [point["metrics"]["val_loss"] for point in record["points"]]
    assert values[0] is None
    best = min(value for value in values if value is not None)
    assert f"Best val_loss: {best:.4f}" in capsys.readouterr().out


def test_the_best_is_the_largest_where_more_is_better(states, tmp_path, capsys):
    run_command(config(states, tmp_path, "line", metric="val_accuracy", mode="max"))
    record = json.loads((tmp_path / "line.json").read_text())
    best = max(point["metrics"]["val_accuracy"] for point in record["points"])
    assert f"Best val_accuracy: {best:.4f} at " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("line", {"kind": "curve"}, r"landscape.kind must be 'line' or 'plane', got 'curve'"),
        ("line", {"num_points": 1}, r"landscape.num_points must be >= 2, got 1"),
        ("line", {"margin": -0.1}, r"landscape.margin must be >= 0, got -0.1"),
        ("line", {"mode": "best"}, r"landscape.mode must be 'min' or 'max', got 'best'"),
        ("line", {"metric": "loss"}, r"logs no 'loss', which landscape.metric names"),
        ("line", {"names": ("first",)}, r"a mapping of at least two names to checkpoints"),
        ("plane", {"names": ("first", "second")}, r"a plane goes through three checkpoints, got 2"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(states, tmp_path, kind, changes, message):
    with pytest.raises(SystemExit, match=message):
        run_command(config(states, tmp_path, kind, **changes))


def test_points_that_span_no_line_or_plane_are_refused():
    with pytest.raises(ValueError, match="the three checkpoints lie on one line"):
        corners([[0, 1, 3], [1, 0, 2], [3, 2, 0]])
    with pytest.raises(ValueError, match="checkpoints 2 and 3 have the same weights"):
        corners([[0, 1, 1], [1, 0, 0], [1, 0, 0]])
    with pytest.raises(ValueError, match="checkpoints 1 and 2 have the same weights"):
        line([[0, 0], [0, 0]], 3, 0)
    with pytest.raises(SystemExit, match=r"no entry 'landscape'; give \+landscape=line"):
        run_command(OmegaConf.create({}))
