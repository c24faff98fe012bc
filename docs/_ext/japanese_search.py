"""Search in English and Japanese.

Japanese has no spaces, so Sphinx would take a whole clause for one word, and a search for `勾配` would find nothing.
Runs of Kanji and of Katakana are indexed by their characters and pairs of characters instead. A query is cut into the
same pairs, and a page is found if it has all of them. Hiragana, mostly particles and endings, separates the runs.
"""

import re

from sphinx.search.en import SearchEnglish

JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff々]+")
RUN = re.compile(r"[\u3400-\u9fff々]+|[\u30a1-\u30ff]+")


def pairs(run):
    """The neighbouring characters of a run."""
    return [run[i : i + 2] for i in range(len(run) - 1)]


class SearchEnglishJapanese(SearchEnglish):
    """English words, and pairs of Japanese characters."""

    lang = "en_ja"
    language_name = "English"  # part of the name of the stemmer in the browser
    js_splitter_code = """
function splitQuery(query) {
  const english = query.replace(/[\\u3040-\\u30ff\\u3400-\\u9fff々]+/gu, " ");
  const words = english.split(/[^\\p{Letter}\\p{Number}_\\p{Emoji_Presentation}]+/gu).filter((word) => word);
  for (const run of query.match(/[\\u3400-\\u9fff々]+|[\\u30a1-\\u30ff]+/gu) || []) {
    if (run.length === 1) words.push(run);
    for (let i = 0; i + 1 < run.length; i++) words.push(run.slice(i, i + 2));
  }
  return words;
}
"""

    def split(self, input):
        words = super().split(JAPANESE.sub(" ", input))
        for run in RUN.findall(input):
            words += [*run, *pairs(run)]
        return words


def setup(app):
    """Registers the language."""
    app.add_search_language(SearchEnglishJapanese)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
