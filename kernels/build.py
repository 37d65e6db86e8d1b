"""Compile kernels/*.cu to the committed PTX.

    python3 kernels/build.py --toolkit   install the pinned compilers, print where they lie
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from toolkit import ToolkitError, ensure_toolkit

KERNELS = Path(__file__).resolve().parent
CACHE = KERNELS.parent / ".cache"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toolkit", action="store_true", help="only install the compilers and print their paths")
    parser.parse_args()
    try:
        tools = ensure_toolkit(CACHE)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"nvcc       {tools.nvcc}\nptxas      {tools.ptxas}\nold ptxas  {tools.old_ptxas}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
