"""Fill the examples of the clients' READMEs from their samples, or check that they are fresh.

    python tools/readmes.py             write clients/*/README.md
    python tools/readmes.py --check     exit 1 if an example differs from its sample

In a README, `<!-- sample: samples/stream.go section:stream -->` stands on a line of its own before a fenced block. The
block gets the lines of that file, which is relative to the README, between the comments `section:stream` and
`endsection:stream`, without their common indent and without the markers of other sections.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MENTION = re.compile(r"^<!-- sample: (?P<file>\S+) section:(?P<section>[\w-]+) -->$", re.MULTILINE)
BLOCK = re.compile(r"\s*^(?P<fence>```+)(?P<language>[\w+-]*)\n(?P<text>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"^\W*(?P<kind>(?:end)?section):(?P<section>[\w-]+)\W*$")


class SampleError(Exception):
    """An example that cannot be filled; says where, and what is wrong."""


def section_of(path: Path, name: str) -> str:
    """The lines of a section, dedented. Raises SampleError."""
    if not path.is_file():
        raise SampleError(f"there is no file {path}")
    lines = path.read_text().splitlines()
    found = [(index, marker) for index, line in enumerate(lines) if (marker := MARKER.match(line))]
    markers = [(index, marker["kind"]) for index, marker in found if marker["section"] == name]
    if [kind for _, kind in markers] != ["section", "endsection"]:
        raise SampleError(f"{path} must hold one comment section:{name} and after it one endsection:{name}")
    (first, _), (last, _) = markers
    inside = [line for line in lines[first:last] if not MARKER.match(line)]
    return textwrap.dedent("\n".join(inside)).strip("\n") + "\n"


def filled(readme: Path) -> str:
    """The text of a README with every example fresh. Raises SampleError."""
    text, done = readme.read_text(), ""
    while mention := MENTION.search(text):
        block = BLOCK.match(text, mention.end())
        if block is None:
            raise SampleError(f"{readme}: a fenced block must follow {mention[0]}")
        example = section_of(readme.parent / mention["file"], mention["section"])
        done += text[: block.start("text")] + example
        text = text[block.end("text") :]
    return done + text


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if an example is stale")
    check = parser.parse_args().check
    try:
        fresh = {readme: filled(readme) for readme in sorted(ROOT.glob("clients/*/README.md"))}
    except SampleError as error:
        print(f"readmes: {error}", file=sys.stderr)
        return 1
    stale = [readme for readme, text in fresh.items() if text != readme.read_text()]
    for readme in stale:
        if not check:
            readme.write_text(fresh[readme])
        print(f"{'stale' if check else 'wrote'}: {readme.relative_to(ROOT)}")
    if check and stale:
        print("run `python tools/readmes.py` and commit")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
