"""The reference: docstrings of public names, listed by topic, and links from inline code to them."""

import functools
import importlib
import inspect
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode

PACKAGE = "keras_gradtools"
BLOCK = re.compile(r"^```\{names\} *(?P<module>[\w.]*)\n(?P<names>.*?)^```$", re.MULTILINE | re.DOTALL)
DISPLAYED_MATH = re.compile(r"^( *)\$\$(.+?)\$\$", re.MULTILINE | re.DOTALL)
MATH = re.compile(r"\$([^$\n]+(?:\n[^$\n]+)?)\$")
PAGE = re.compile(r"\bdocs/([\w/]+)\.md\b")
CODE_BEFORE_LETTER = re.compile(r"(`[^`]+`)(?=(\w)?)")
# `kg.attacks.pgd`, `attacks.pgd(model, x, y)`, `PGD`, `hvp`: a dotted name, perhaps with arguments.
CODE = re.compile(r"(?:kg\.|keras_gradtools\.)?([A-Za-z_][\w.]*)(\(.*\))?$", re.DOTALL)


# Methods that other modules of the package call, and users do not.
INTERNAL = {
    "attempt",
    "batches",
    "can_start_spectrum",
    "check",
    "compile_from_config",
    "compute",
    "count_examples",
    "end_step",
    "is_of_logits",
    "load_own_variables",
    "of_batch",
    "of_callback",
    "outputs_of_example",
    "rate",
    "require_enough_outputs",
    "spectrum_start",
    "worst",
}


def public_name(name):
    """The object of a dotted name inside the package."""
    found = importlib.import_module(PACKAGE)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def directive(name):
    """The lines that document one public name."""
    found = public_name(name)
    if not inspect.isclass(found):
        return [f".. autofunction:: {PACKAGE}.{name}", ""]
    if issubclass(found, Exception):
        return [f".. autoexception:: {PACKAGE}.{name}", ""]
    lines = [f".. autoclass:: {PACKAGE}.{name}", ""]
    for member, kind in members(found):
        lines += [f"   .. auto{kind}:: {PACKAGE}.{name}.{member}", ""]
    return lines


def members(cls):
    """The documented methods and properties of a class, without those that the reference lists for a base of it."""
    listed = [each for each in public_classes() if each is not cls and issubclass(cls, each)]
    seen = set()
    for base in cls.__mro__:
        for name, found in vars(base).items():
            is_method = inspect.isfunction(found) or isinstance(found, classmethod | staticmethod)
            if name in seen or not (is_method or isinstance(found, property | functools.cached_property)):
                continue
            seen.add(name)
            if name.startswith("_") or name in INTERNAL or any(issubclass(each, base) for each in listed):
                continue
            holders = (getattr(found, attribute, None) for attribute in ("fget", "func", "__func__"))
            function = next(filter(None, holders), found)
            if function.__doc__ and function.__module__.startswith(PACKAGE):
                yield name, "method" if is_method else "property"


@functools.cache
def public_classes():
    """The classes that the modules of the package export."""
    package = importlib.import_module(PACKAGE)
    found = [getattr(package, name) for name in package.__all__]
    inner = [vars(module)[name] for module in found if inspect.ismodule(module) for name in module.__all__]
    return {each for each in (*found, *inner) if inspect.isclass(each)}


def expand_names(app, page, source):
    """Turns each block of names into a table of summaries and the documentation of each name."""

    def expand(block):
        prefix = f"{block['module']}." if block["module"] else ""
        names = [prefix + name for name in block["names"].split()]
        lines = [f".. currentmodule:: {PACKAGE}", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names] + [""]
        lines += [line for name in names for line in directive(name)]
        return "```{eval-rst}\n" + "\n".join(lines) + "\n```"

    source[0] = BLOCK.sub(expand, source[0])


def adapt_docstring(app, what, name, found, options, lines):
    """Docstrings have formulas between dollars plurals of code (`Dense`s), and names of pages."""
    text = "\n".join(lines)
    text = DISPLAYED_MATH.sub(lambda formula: f"{formula[1]}.. math:: {' '.join(formula[2].split())}", text)
    text = MATH.sub(lambda formula: f":math:`{' '.join(formula[1].split())}`", text)
    text = PAGE.sub(r":doc:`/\1`", text)
    lines[:] = CODE_BEFORE_LETTER.sub(lambda span: span[1] + ("\\ " if span[2] else ""), text).split("\n")


def show_constructor(app, what, name, found, options, signature, returns):
    """Shows the parameters of a class whose `__new__`, that of Keras, takes any arguments."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    parameters = list(inspect.signature(found.__init__).parameters.values())[1:]
    shown = inspect.Signature(parameters)
    return stringify_signature(shown, unqualified_typehints=True), returns


class LinkNames(SphinxPostTransform):
    """Makes links of inline code that is a public name, and shows the package as `kg`."""

    default_priority = 400

    def run(self, **kwargs):
        for name in self.document.findall(addnodes.desc_addname):
            name.replace_self(addnodes.desc_addname(text := name.astext().replace(f"{PACKAGE}.", "kg.", 1), text))
        for code in list(self.document.findall(nodes.literal)):
            if not isinstance(code.parent, nodes.reference | addnodes.pending_xref | nodes.title):
                self.link(code)

    def link(self, code):
        if not (match := CODE.match(code.astext())) or not (target := self.target(code, match[1])):
            return
        entry = self.env.get_domain("py").objects[target]
        if entry.docname == self.env.docname and entry.node_id in own_ids(code):
            return
        reference = make_refnode(
            self.app.builder, self.env.docname, entry.docname, entry.node_id, code.deepcopy(), target
        )
        code.replace_self(reference)

    def target(self, code, name):
        """The full name of the object that a piece of code names, or None."""
        objects = self.env.get_domain("py").objects
        if code.astext().startswith(("kg.", f"{PACKAGE}.")) or "." in name or name[0].isupper():
            full = f"{PACKAGE}.{name}"
            if full in objects:
                return full
        elif f"{PACKAGE}.{name}" in objects and name not in parameters(code):
            return f"{PACKAGE}.{name}"
        if name[0].isupper() and "." not in name:
            found = [known for known, entry in objects.items() if known.endswith(f".{name}") and not entry.aliased]
            return found[0] if len(found) == 1 else None
        return None


def descriptions(node):
    """The descriptions of objects that a node stands in, from the inside out."""
    while node := node.parent:
        if isinstance(node, addnodes.desc):
            yield node


def own_ids(code):
    """The targets of the objects in whose description a piece of code stands."""
    signatures = [signature for desc in descriptions(code) for signature in desc.findall(addnodes.desc_signature)]
    return {target for signature in signatures for target in signature["ids"]}


def parameters(code):
    """The names of the parameters of the objects in whose description a piece of code stands."""
    return {
        name.astext()
        for desc in descriptions(code)
        for parameter in desc.findall(addnodes.desc_parameter)
        for name in parameter.findall(addnodes.desc_sig_name)
    }


def setup(app):
    """Connects the functions of this module to Sphinx."""
    app.connect("source-read", expand_names)
    app.connect("autodoc-process-docstring", adapt_docstring)
    app.connect("autodoc-process-signature", show_constructor)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
