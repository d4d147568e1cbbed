"""The Lightning callbacks, for `Trainer(callbacks=[...])`."""
