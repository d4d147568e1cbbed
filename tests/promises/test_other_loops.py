"""`Merger` where no Trainer of Lightning trains: Fabric, Accelerate, Hugging Face's Trainer, DDP and FSDP2 by hand."""

import io
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from merge_callback import Ema, Merger
from tests.helpers import reference
from tests.helpers.loops import Loop, Net
from tests.helpers.ranks import Ranks
from tests.helpers.toys import same

MERGES: dict[str, Any] = {"sma": "sma", "ema": Ema(half_life_steps=3)}


class Wrapped(Loop):
    """A loop whose model and optimizer Fabric or Accelerate have wrapped."""

    def wrap(self, model: nn.Module, optimizer: Any) -> "Wrapped":
        self.model, self.optimizer = model, optimizer
        return self


def fabric_loop(merger: Merger | None) -> Loop:
    loop = Wrapped(merger)
    return loop.wrap(*Fabric(accelerator="cpu", devices=1).setup(loop.model, loop.optimizer))


def accelerate_loop(merger: Merger | None) -> Loop:
    loop = Wrapped(merger)
    return loop.wrap(*Accelerator(cpu=True).prepare(loop.model, loop.optimizer))


@pytest.mark.parametrize("wrapped", [fabric_loop, accelerate_loop])
def test_fabric_and_accelerate_train_the_same_with_it(wrapped):
    alone, watched = wrapped(None).run(16), wrapped(Merger(2, 4, merges=MERGES, forecast=0.1)).run(16)
    plain = Loop(Merger(2, 4, merges=MERGES)).run(16)
    assert same(alone.model.state_dict(), watched.model.state_dict())
    assert same(alone.weights, watched.weights)
    assert watched.merger.snapshot_steps == [10, 12, 14, 16]
    merged = watched.merger.merged_state_dict(watched.model)
    assert same(merged, plain.merger.merged_state_dict(plain.model))
    watched.model.load_state_dict(merged)


class Tokens(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(12) * (index % 5 + 1)) % 32
        return {"input_ids": tokens, "labels": tokens}


class Merging(TrainerCallback):
    """What the documentation shows, for Hugging Face's Trainer."""

    def __init__(self, merger: Merger) -> None:
        self.merger = merger
        self.logged: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, *, model, optimizer, **kwargs):
        self.merger.step(model, optimizer)

    def on_evaluate(self, args, state, control, *, model, metrics, eval_dataloader, **kwargs):
        if self.merger.is_ready:
            with self.merger.merged_weights(model):
                merged = evaluate(model, eval_dataloader)
            self.logged.append(self.merger.observe({"eval_loss": metrics["eval_loss"]}, {"eval_loss": merged}))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Any) -> float:
    model.eval()
    losses = [float(model(**batch).loss) for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def hugging_face(folder: Any, *callbacks: TrainerCallback) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=4,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    model = LlamaForCausalLM(config)
    trainer = Trainer(model, arguments, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=list(callbacks))
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.slow
def test_hugging_faces_trainer_trains_the_same_with_it(tmp_path):
    alone = hugging_face(tmp_path / "alone")
    watched = hugging_face(tmp_path / "watched", merging := Merging(Merger(2, 3)))
    assert same(alone.model.state_dict(), watched.model.state_dict())
    assert merging.merger.snapshot_steps == [8, 10, 12]
    assert len(merging.logged) == 3
    last = merging.logged[-1]
    live = next(each["eval_loss"] for each in reversed(watched.state.log_history) if "eval_loss" in each)
    assert last["merge_gain/eval_loss"] == pytest.approx(live - last["merged/eval_loss"], abs=1e-6)
    watched.model.load_state_dict(merging.merger.merged_state_dict(watched.model))


# Several ranks, in loops written by hand.


def begin_process_group() -> None:
    """Makes the group that such a program makes first, unless an earlier test has left one."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


def form_of(form: str, model: Net) -> nn.Module:
    if form == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in (model.first, model.last, model):
        fully_shard(layer, mesh=mesh)
    return model


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: (value.full_tensor() if isinstance(value, DTensor) else value) for name, value in state.items()}
    return {name.removeprefix("module."): value.detach().clone() for name, value in found.items()}


class Sharded(Loop):
    """A loop over the same batches on every rank."""

    form = "ddp"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model.drop.p = 0.0
        self.model = form_of(self.form, self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)

    def observe(self, step: int, live: dict[str, float]) -> None:
        super().observe(step, live)
        self.weights[step] = whole(dict(self.model.named_parameters()))


class FullySharded(Sharded):
    form = "fsdp"


def train(form: str) -> dict[str, Any]:
    begin_process_group()
    loop_class: Any = {"ddp": Sharded, "fsdp": FullySharded}[form]
    alone = loop_class(None, validate_every=2).run(16)
    merger = Merger(2, 4, merges=MERGES, snapshot="mean" if form == "fsdp" else "point")
    watched = loop_class(merger, validate_every=1 if form == "fsdp" else 2).run(16)
    return {
        "alone": whole(alone.model.state_dict()),
        "watched": whole(watched.model.state_dict()),
        "weights": watched.weights,
        "merged": whole(merger.merged_state_dict(watched.model)),
        "steps": merger.snapshot_steps,
        "logged": watched.logged[16],
        "state": resumed(loop_class, form),
    }


def resumed(loop_class: Any, form: str) -> tuple[Any, ...]:
    """Merges of a run that went through, and of one whose ranks saved and loaded their own states."""
    options: dict[str, Any] = {"merges": MERGES, "snapshot": "mean"}
    through = loop_class(Merger(3, 3, **options)).run(11)
    file = io.BytesIO()
    torch.save(through.merger.state_dict(), file)
    file.seek(0)
    again = Merger(3, 3, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    through.run(13, 11)
    # The same weights once more, for the merger that has loaded: a loop that was saved here would continue with them.
    late = loop_class(None).run(11)
    late.merger = again
    late.run(13, 11)
    names = list(MERGES)
    return tuple([whole(loop.merger.merged_state_dict(loop.model, name)) for name in names] for loop in (through, late))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_several_ranks_train_the_same_with_it_and_merge_their_own_parts(two_ranks: Ranks, form):
    first, second = two_ranks.run(train, form)
    assert same(first["alone"], first["watched"])
    assert same(first["watched"], second["watched"])
    assert first["steps"] == second["steps"] == [10, 12, 14, 16]
    per_step = dict.fromkeys(range(9, 17), 0.125) if form == "fsdp" else dict.fromkeys((10, 12, 14, 16), 0.25)
    expected = reference.merge([first["weights"][step] for step in per_step], list(per_step.values()))
    for name, value in expected.items():
        if name != "frozen":
            torch.testing.assert_close(first["merged"][name].double(), value, rtol=1e-5, atol=1e-6)
    assert first["logged"]["merged/val_loss"] == pytest.approx(second["logged"]["merged/val_loss"])
    for through, late in (first["state"], second["state"]):
        assert same(through, late)


def load_of_other_ranks() -> str:
    begin_process_group()
    loop = FullySharded(merger := Merger(2, 4)).run(4)
    state = merger.state_dict()
    said = []
    for ranks in ([0, 4], []):
        other = Merger(2, 4)
        other.load_state_dict(state | {"ranks": ranks})
        # The state still waits after an error, so a second call is refused too.
        for _ in range(2):
            with pytest.raises(ValueError, match="as many ranks load a state as saved it") as refused:
                other.merged_state_dict(loop.model)
        said.append(str(refused.value))
        assert other.num_steps == 4
    return "; ".join(said)


@pytest.mark.slow
def test_shards_of_other_ranks_are_refused(two_ranks: Ranks):
    for rank, said in enumerate(two_ranks.run(load_of_other_ranks)):
        assert f"the shards of rank 0 of 4, and this is rank {rank} of 2" in said
        assert f"a whole model, and this is rank {rank} of 2" in said
