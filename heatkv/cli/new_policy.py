"""`heatkv new-policy`: a package for a policy of one's own, with its entry point and its test."""

from __future__ import annotations

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from heatkv.cli.output import say
from heatkv.core.io import write_text
from heatkv.errors import FormatError, PolicyError
from heatkv.registry import check_name, registered_policies


def new_policy(
    *,
    name: Annotated[str, typer.Argument(help="name of the policy: lower-case letters, digits, hyphens between them")],
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="a policy that chooses tokens while images are drawn")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="folder to make (default: heatkv-NAME)")] = None,
) -> None:
    """Write a package with a small working policy, its entry point and its test, to be changed.

    Example: heatkv new-policy keep-coarse --out keep-coarse
    """
    check_name(name, "the policy")
    known = registered_policies().get(name)
    if known is not None:
        raise PolicyError(f"a policy is named {name!r} already, from {known.source}; choose another name")
    files = skeleton(name, dynamic)
    folder = Path(f"heatkv-{name}") if out is None else out
    if folder.exists() or folder.is_symlink():
        raise FormatError(f"{folder} exists already; name a folder that does not")
    for path, (text, _) in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / path, text)
    print("\n".join(f"{folder / path}: {what}" for path, (_, what) in files.items()))
    say(f"next: pip install -e {folder}, then `heatkv policies` lists {name}, and `pytest {folder}` tests it")


def skeleton(name: str, dynamic: bool) -> dict[str, tuple[str, str]]:
    """Path -> (text, what it is) of every file of the package."""
    module = f"heatkv_{name.replace('-', '_')}"
    kind = "dynamic" if dynamic else "static"
    code = _template(f"{kind}.py")
    fields = {
        "name": name,
        "distribution": f"heatkv-{name}",
        "module": module,
        "policy": _class_name(name, code.template),
    }
    return {
        "pyproject.toml": (_template("pyproject.toml").substitute(fields), "the package and its entry point"),
        "README.md": (_template("README.md").substitute(fields), "how to install, test and compare it"),
        f"src/{module}.py": (code.substitute(fields), f"the policy, a {kind} one"),
        f"tests/test_{module.removeprefix('heatkv_')}.py": (_template("test.py").substitute(fields), "its test"),
    }


def _template(name: str) -> Template:
    return Template(resources.files("heatkv.cli").joinpath("templates", f"{name}.template").read_text(encoding="utf-8"))


def _class_name(name: str, code: str) -> str:
    """The name in camel case, with "Policy" in front where it would be no name or hide one that the code uses."""
    camel = "".join(part.capitalize() for part in name.split("-"))
    if camel[0].isdigit() or keyword.iskeyword(camel) or re.search(rf"\b{camel}\b", code):
        return f"Policy{camel}"
    return camel
