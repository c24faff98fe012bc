"""What the index shows of the package: the links of the project, and the README with absolute links.

The project has no home of its own yet. `KERAS_GRADTOOLS_HOME`, the URL of the repository, names one at build time:

    KERAS_GRADTOOLS_HOME=https://host/owner/keras_gradtools python -m build

Without it, the package has no links, and the relative links of the README, which lead nowhere outside of the
repository, become their text.
"""

import os
import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOME = "KERAS_GRADTOOLS_HOME"
# `[text](target)` or `![text](target)`, with a target in the repository.
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


class ProjectMetadata(MetadataHookInterface):
    """Fills in `readme` and `urls`, which pyproject.toml declares as dynamic."""

    def update(self, metadata):
        home = os.environ.get(HOME, "").rstrip("/")
        text = rendered((ROOT / "README.md").read_text(encoding="utf-8"), home, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(home)


def urls(home):
    """The links of the project; none without a home."""
    if not home:
        return {}
    return {
        "Homepage": home,
        "Documentation": f"{home}/blob/main/docs/index.md",
        "Changelog": f"{home}/blob/main/CHANGELOG.md",
        "Source": home,
        "Issues": f"{home}/issues",
    }


def rendered(text, home, tag):
    """The README with absolute links to files of this version, or without links if there is no home."""

    def absolute(link):
        is_image, words, target = link.groups()
        if not home:
            return "" if is_image else words
        return f"{is_image}[{words}]({home}/{'raw' if is_image else 'blob'}/{tag}/{target})"

    return "".join(part if part.startswith("```") else RELATIVE.sub(absolute, part) for part in CODE.split(text))
