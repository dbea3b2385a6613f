"""A hook of mkdocs: pages of the site that do not lie in docs/, and links that lead to them.

README, changelog and the kernels' pages stay where a reader of the source tree looks for them.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

PAGES = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("kernels/README.md", "kernels/COMPILE.md"),
)


def on_files(files: Any, config: Any) -> Any:
    """Add ``PAGES`` under the paths that they have in the source tree."""
    for name in PAGES:
        content = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links of pages in docs/ to those outside, and the other way round, as the site has them.

    In the source tree docs/gpu.md links ../kernels/COMPILE.md; on the site docs/ is the root.
    """
    if page.file.src_uri in PAGES:
        return re.sub(r"\]\((?:\.\./)?docs/", "](" + "../" * page.file.src_uri.count("/"), markdown)
    return re.sub(r"\]\(\.\./", "](", markdown)
