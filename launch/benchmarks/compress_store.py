"""Peak memory and padding of `icae compress --store`, for several numbers of documents.

    python launch/benchmarks/compress_store.py --adapter quickstart/icae/finetune \
        --input DATA/arxiv/train.jsonl.gz --counts 1000,10000

Each number is compressed into a new store by a process of its own. With a bound on memory that
holds, the peak of many documents is that of few.
"""

import argparse
import itertools
import json
import pathlib
import resource
import subprocess
import sys
import tempfile

from icae_jax.data.documents import Documents
from icae_jax.errors import UserError
from icae_jax.workflows import compress_store

COLUMNS = ("documents", "context_tokens", "padding", "seconds", "peak_mib", "store_mib")


def measure(input_path: str, store: str, adapter: str) -> dict:
    """Fills a store in this process. Peak memory is all that the process ever held, in MiB."""
    result = compress_store.compress_store(compress_store.Request(input_path, store, adapter))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    files = (path for path in pathlib.Path(store).rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 2**20
    return result | {"peak_mib": peak, "store_mib": size}


def first_documents(source: str, count: int, path: pathlib.Path) -> str:
    """Writes the first documents of a source as JSON lines. UserError if there are fewer."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for document in itertools.islice(Documents(source), count):
            row = {"id": document.id, "text": document.text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    if written < count:
        raise UserError(f"--input {source} has {written:,} documents, not {count:,}")
    return str(path)


def main() -> None:
    """Measures each number of documents and prints a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", required=True, help="what compresses: see icae compress")
    parser.add_argument("--input", required=True, help="documents: JSON lines, tables, texts")
    parser.add_argument("--counts", default="1000,10000", help="numbers of documents")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the store that this process fills
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.input, args.child, args.adapter)))
        return
    for count in map(int, args.counts.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            source = first_documents(args.input, count, pathlib.Path(folder) / "documents.jsonl")
            child = [sys.executable, __file__, "--adapter", args.adapter, "--input", source]
            child += ["--child", f"{folder}/store"]
            ended = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(ended.stdout)
        print(json.dumps({name: result[name] for name in COLUMNS}), flush=True)


if __name__ == "__main__":
    main()
