"""Markdown of a page for a notebook, which knows neither tabs nor the other pages of the site."""

import itertools
import re

OPENING = re.compile(r"(?P<fence>`{3,}|:{3,})(?P<name>\{tab-set\}|\{tab-item\})?(?P<title>.*)")
LINK = re.compile(r"(?<!!)\[(?P<text>[^]]+)\]\((?!\w+:)[^)]+\)")


def plain_markdown(text):
    """Puts tabs one below the other, each behind its title, and replaces links to other pages by their text."""
    parts, fences, in_options = [], [], False
    for line in text.splitlines():
        in_code = bool(fences) and not fences[-1][1]
        opening = OPENING.fullmatch(line)
        if fences and line == fences[-1][0]:
            fences.pop()
            parts.append((in_code, line if in_code else ""))
        elif in_code:
            parts.append((True, line))
        elif opening:
            fences.append((opening["fence"], opening["name"]))
            in_options = bool(opening["name"])
            if opening["name"] == "{tab-item}":
                # Bold and not a heading, because the text that follows the last tab would seem to belong to it.
                parts += [(False, ""), (False, f"**{opening['title'].strip()}**"), (False, "")]
            elif not opening["name"]:
                parts.append((True, line))
        elif not (in_options and line.startswith(":")):
            in_options = False
            parts.append((False, line))
    blocks = []
    for is_code, lines in itertools.groupby(parts, key=lambda part: part[0]):
        block = "\n".join(line for _, line in lines)
        if not is_code:
            # The text of a link may go on in the next line.
            block = LINK.sub(r"\g<text>", block)
            block = re.sub(r"\n{2,}", "\n\n", f"\n{block}\n")[1:-1]
        blocks.append(block)
    return "\n".join(blocks).strip("\n")
