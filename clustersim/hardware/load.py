"""Link and framework profiles by name."""

from __future__ import annotations

import functools

from clustersim.files import load, profile_path
from clustersim.hardware.framework import Framework
from clustersim.hardware.link import Link


def load_link(name: str) -> Link:
    """The link profile `name`; ProfileError with the known names where there is none. Cached."""
    return _link(str(profile_path("links", name).resolve()))


def load_framework(name: str) -> Framework:
    """The framework profile `name`; ProfileError with the known names where there is none. Cached."""
    return _framework(str(profile_path("frameworks", name).resolve()))


# The cache is keyed by the file, not by the name: what a name means depends on the working folder.
@functools.cache
def _link(path: str) -> Link:
    link: Link = load(Link, path)
    return link


@functools.cache
def _framework(path: str) -> Framework:
    framework: Framework = load(Framework, path)
    return framework
