"""Notebook pages: a download of each as .ipynb, and a link between the languages of the guide."""

import pathlib
import re

import jupytext
from docutils import nodes
from plain_markdown import plain_markdown

LANGUAGES = {"en": "English", "ja": "日本語"}


# What TensorFlow writes when it starts, whatever its log level.
STARTUP = re.compile(r"^(WARNING: All log messages before absl|[IWE]0000 00:00).*\n?", re.MULTILINE)


def is_notebook(app, name):
    """Whether a page is a MyST-NB notebook: its front matter names a kernel."""
    return "kernelspec" in app.env.metadata.get(name, {})


def translation(app, name):
    """The same page of the guide in the other language, as `(code, label, page)`, or None."""
    for code in LANGUAGES:
        if name.startswith(f"guide/{code}/"):
            for other, label in LANGUAGES.items():
                page = name.replace(f"guide/{code}/", f"guide/{other}/", 1)
                if other != code and page in app.env.found_docs:
                    return other, label, page
    return None


def add_context(app, name, template, context, doctree):
    """Tells the templates the language of a page, its translation, and where its notebook is."""
    if name.startswith("guide/ja/"):
        context["language"] = "ja"
    context["translation"] = translation(app, name)
    context["notebook"] = f"_notebooks/{name}.ipynb" if is_notebook(app, name) else None


def set_output_folder(app):
    """Puts the pictures of the notebooks where `make clean` finds them, instead of beside the site."""
    folder = pathlib.Path(app.confdir).parent / "out" / "docs" / "pictures"
    app.env.mystnb_config = app.env.mystnb_config.copy(output_folder=str(folder))


def remove_startup_messages(app, doctree):
    """Removes TensorFlow's messages from the outputs of cells. Warnings stay."""
    for block in list(doctree.findall(nodes.literal_block)):
        if "stderr" in block["classes"]:
            text = STARTUP.sub("", block.astext())
            if text.strip():
                block[:] = [nodes.Text(text)]
                block.rawsource = text
            else:
                block.parent.remove(block)


def read_notebook(path):
    """The notebook of a page. The format .ipynb needs a name to display for its kernel, which a page may leave out."""
    text = path.read_text("utf-8")
    if "display_name:" not in text:
        text = text.replace("kernelspec:\n", "kernelspec:\n  display_name: Python 3\n", 1)
    notebook = jupytext.reads(text, "md:myst")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain_markdown(cell.source)
    return notebook


def write_notebooks(app, error):
    """Writes each notebook page as .ipynb, without outputs, into the site."""
    if error or app.builder.format != "html":
        return
    for name in sorted(app.env.found_docs):
        if is_notebook(app, name):
            target = pathlib.Path(app.outdir, "_notebooks", f"{name}.ipynb")
            target.parent.mkdir(parents=True, exist_ok=True)
            jupytext.write(read_notebook(app.env.doc2path(name)), target)


def setup(app):
    """Connects the functions of this module to Sphinx."""
    app.connect("builder-inited", set_output_folder, priority=900)
    app.connect("doctree-read", remove_startup_messages)
    app.connect("html-page-context", add_context)
    app.connect("build-finished", write_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
