"""Text of the organ demo for tests: of the library only a package, and the topics, for all of it takes seconds to read."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

from transplant_ray.pipeline import demo_text
from transplant_ray.pipeline.demo_text import DemoText, make_text
from transplant_ray.recipe import DemoSpec
from transplant_ray.zoo.library_text import Document, library_documents

PACKAGE = Path(json.__file__).parents[1] / "asyncio"


def some_documents(characters: int) -> list[Document]:
    return library_documents(characters, PACKAGE)


def small_text(spec: DemoSpec, folder: Path, domain: Path | None = None) -> DemoText:
    with patch.object(demo_text, "library_documents", some_documents):
        return make_text(spec, folder, domain)
