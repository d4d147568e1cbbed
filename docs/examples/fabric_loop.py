"""`Merger` in a loop of Lightning Fabric."""

import torch
from lightning.fabric import Fabric, seed_everything
from torch import nn
from torch.nn import functional as F
from toy import Points

from merge_callback import Merger

fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
seed_everything(1)
model = nn.Linear(8, 1)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
points = Points()
points.setup("fit")
batches, validation = fabric.setup_dataloaders(points.train_dataloader(), points.val_dataloader())
merger = Merger()


@torch.no_grad()
def validate() -> dict[str, float]:
    return {"val_loss": float(torch.stack([F.mse_loss(model(x), y) for x, y in validation]).mean())}


for epoch in range(8):
    for x, y in batches:
        fabric.backward(F.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        merger.step(model, optimizer)
    live = validate()
    with merger.merged_weights(model):
        merged = validate()
    fabric.print(epoch, live, merger.observe(live, merged))

fabric.save("fabric.ckpt", {"model": model, "optimizer": optimizer, "merger": merger.state_dict()})
print("live ", live["val_loss"])
print("merged ", merged["val_loss"])
