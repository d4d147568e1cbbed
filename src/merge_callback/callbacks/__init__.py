"""What goes into `Trainer(callbacks=[...])`."""
