"""`Merger` in a loop of plain PyTorch, with a checkpoint to resume from."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_callback import Merger

CHECKPOINT = Path("plain_loop.pt")
torch.manual_seed(1)
model = nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
merger = Merger()


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 8)
    return x, x.sum(1, keepdim=True) + torch.randn(16, 1)


validation = [batch() for _ in range(32)]


@torch.no_grad()
def validate() -> dict[str, float]:
    return {"val_loss": float(torch.stack([F.mse_loss(model(x), y) for x, y in validation]).mean())}


if CHECKPOINT.exists():
    saved = torch.load(CHECKPOINT, weights_only=True)
    for name, part in {"model": model, "optimizer": optimizer, "warmup": warmup, "merger": merger}.items():
        part.load_state_dict(saved[name])

while merger.num_steps < 600:
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    warmup.step()
    # After the schedulers. All that is captured happens here.
    merger.step(model, optimizer)

    if merger.num_steps % 50 == 0:
        live = validate()
        with merger.merged_weights(model):
            merged = validate()
        # What to give to a logger, with the names that `MergeCallback` logs.
        logged = merger.observe(live, merged)
        print(merger.num_steps, {name: round(value, 4) for name, value in {**live, **logged}.items()})
        parts = {"model": model, "optimizer": optimizer, "warmup": warmup, "merger": merger}
        torch.save({name: part.state_dict() for name, part in parts.items()}, CHECKPOINT)

print("live ", validate()["val_loss"])
print("merged ", logged["merged/val_loss"])
torch.save(merger.merged_state_dict(model), "merged_loop.pt")
