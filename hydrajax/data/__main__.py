"""Encode texts once for many runs.

python -m hydrajax.data --files corpus/*.txt --tokenizer teachers/smollm2 --out corpus.tokens
"""

import argparse
import sys
import time
from pathlib import Path

from hydrajax.data.sources import open_documents
from hydrajax.data.tokens import tokenize_documents
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hydrajax.data", description="Encode texts once for many runs."
    )
    parser.add_argument("--files", nargs="+", required=True, help="as in data.files")
    parser.add_argument("--tokenizer", required=True, help="folder, tokenizer.json or 'bytes'")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, X.tokens")
    parser.add_argument("--text_key", default="text", help="field of jsonl and parquet rows")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        tokenizer = load_tokenizer(args.tokenizer)
        documents = open_documents(args.files, args.text_key, tokenizer)
        one_by_one = (documents[i] for i in range(len(documents)))
        counts = tokenize_documents(one_by_one, tokenizer, args.out)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    print(
        f"{args.out}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
        f"{seconds:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
