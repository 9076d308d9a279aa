"""The PEP 517 backend: setuptools' own, which also asks for what compiling the CUDA library needs."""

import os

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from native_build import cuda

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings=None):
    """What an isolated build has to install first."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *cuda.requirements(os.environ)]


def get_requires_for_build_editable(config_settings=None):
    """The same for `pip install -e`."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *cuda.requirements(os.environ)]
