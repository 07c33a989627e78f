"""The command `lda`. Needs the extra `cli`; this module imports without it, to say so."""

from __future__ import annotations

import sys

EXTRA_PACKAGES = ("click", "rich")


def main() -> None:
    """Run the command; or say what is missing and exit with 2."""
    try:
        from lda_client._cli import lda
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_PACKAGES:
            raise
        print(f"The command `lda` needs {error.name}: install it with pip install 'lda-client[cli]'.", file=sys.stderr)
        sys.exit(2)
    lda(prog_name="lda")


if __name__ == "__main__":
    main()
