"""`MergeCallback` with LightningCLI, from a file or by its name on the command line:

python cli.py fit --config cli.yaml
python cli.py fit --trainer.max_epochs=5 --trainer.callbacks+=MergeCallback --trainer.callbacks.num_snapshots=5
python cli.py fit --trainer.callbacks.help=MergeCallback
"""

from lightning.pytorch.cli import LightningCLI
from toy import Line, Points

# LightningCLI knows callbacks by their short names once they are imported.
import merge_callback  # noqa: F401

if __name__ == "__main__":
    LightningCLI(Line, Points, seed_everything_default=1)
