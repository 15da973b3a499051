"""How the documentation site is built: `make docs`.

The command line and the fields of the configuration come from the code: `<!-- commands -->` and `<!-- fields -->` in a
page stand for them.
"""

import typer.cli
import typer.main

import peft_child
from peft_child import ChildTuningConfig
from peft_child.cli.main import app as command_line


project = "peft-child"
author = "The peft-child authors"
copyright = "the peft-child authors"
release = peft_child.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # a test runs the notebooks
exclude_patterns = ["results/results.jsonl"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures and docstrings say what is taken
autodoc_mock_imports = ["vllm"]
napoleon_numpy_docstring = False

default_role = "code"  # what stands in single backticks in docstrings
html_theme = "furo"
html_title = f"peft-child {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
copybutton_prompt_text = "$ "


def commands():
    """The page of the command line, as Typer writes it, from the second level of headings on."""
    group = typer.main.get_command(command_line)
    context = type(group).context_class(group, info_name="peft-child")
    return typer.cli.get_docs_for_click(obj=group, ctx=context, name="peft-child").partition("\n")[2]


def fields():
    """Every field of the configuration with its default and what `ChildTuningConfig.describe()` says of it."""
    described = (ChildTuningConfig.__dataclass_fields__[name] for name in ChildTuningConfig.__annotations__)
    return "\n".join(f"`{field.name} = {field.default!r}`\n: {field.metadata['help']}\n" for field in described)


def fill_in(app, name, source):
    """Put what comes from the code into a page."""
    for marker, make in {"<!-- commands -->": commands, "<!-- fields -->": fields}.items():
        if marker in source[0]:
            source[0] = source[0].replace(marker, make())


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", fill_in)
