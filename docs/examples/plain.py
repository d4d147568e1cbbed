"""`MergeCallback` in plain Python: python plain.py"""

from lightning.pytorch import Trainer, seed_everything
from toy import Line, Points

from merge_callback import Ema, MergeCallback, Window

seed_everything(1)
callback = MergeCallback(merges={"sma": "sma", "late": Window(span=0.05), "ema": Ema(half_life=0.05)})
trainer = Trainer(max_epochs=5, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False)
model = Line()
trainer.fit(model, Points())

print("live", float(trainer.callback_metrics["val_loss"]))
print("merged", float(trainer.callback_metrics["merged/val_loss"]))
print("snapshots at steps", callback.snapshot_steps)
callback.save_merged("merged.ckpt")
