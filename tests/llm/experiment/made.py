"""A sweep without a model: documents, rows in the form of the real ones, and a process that can be killed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lzero_kv.llm.experiment.documents import Document

METHODS = ('full', 'cake 0.5', 'h2o 0.5', 'cake 0.25', 'h2o 0.25')
HEADER = {'model': 'made', 'seed': 3, 'methods': list(METHODS), 'versions': {'torch': '2.13.0'}}


def documents(count: int = 6) -> list[Document]:
    """Documents of two tasks, all of different sizes."""
    return [
        Document(task, f'text {index}', tuple(range(100 + 7 * index)), tuple(range(offset + 1)))
        for index in range(count)
        for offset, task in enumerate(('continuation', 'needle'))
    ]


def score(document: Document) -> Iterator[dict[str, object]]:
    """Rows that tell the documents and the methods apart."""
    for index, method in enumerate(METHODS):
        yield {
            'task': document.task,
            'document': document.id,
            'method': method,
            'kl': 0.01 * index + 0.001 * document.size,
        }


def slow_score(document: Document, begun: Path, seconds: float) -> Iterator[dict[str, object]]:
    """The same, each row after some time; a line in a file says that the document was begun."""
    with begun.open('a', encoding='utf-8') as file:
        file.write(f'{document.task} {document.id}\n')
    for row in score(document):
        time.sleep(seconds / len(METHODS))
        yield row


def main(folder: Path, begun: Path, seconds: float) -> None:
    """A process of its own that takes part in a sweep."""
    from lzero_kv.sweep.sweep import Sweep

    Sweep(folder, HEADER).run(documents(), lambda document: slow_score(document, begun, seconds))


if __name__ == '__main__':
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
