"""Compare the contract with that of the last release, or keep the one of a new release.

    python tools/contract.py check              exit 1 if the contract breaks a promise of the last release
    python tools/contract.py release 0.2.0      keep the contract as proto/released/v0.2.0.binpb.gz

A release is kept as an image of buf: the parsed files with all that they import, so that it needs neither git nor the
files of its time. docs/versions.md says what may change.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASED = ROOT / "proto/released"
CONTRACT = "proto/lda"
BUF = str(Path(sys.executable).with_name("buf"))
VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def image_of(version: str) -> Path:
    """Where the contract of a release is kept."""
    return RELEASED / f"v{version}.binpb.gz"


def released() -> list[str]:
    """The versions that are kept, the oldest first."""
    names = [path.name.removeprefix("v").removesuffix(".binpb.gz") for path in RELEASED.glob("v*.binpb.gz")]
    return sorted(names, key=lambda name: tuple(map(int, name.split("."))))


def run(*command: str) -> int:
    """Run a command in the repository; its exit status."""
    return subprocess.run(command, cwd=ROOT).returncode


def build(output: Path, *options: str) -> None:
    """Write the image of the contract as it stands. Raises SystemExit if it has a fault."""
    if run(BUF, "build", *options, "--path", CONTRACT, "-o", str(output)):
        raise SystemExit("contract: buf could not read it; see the lines above")


def is_tagged(version: str) -> bool:
    """Whether git knows the tag of this version."""
    looked_up = ["git", "rev-parse", "-q", "--verify", f"refs/tags/v{version}"]
    return subprocess.run(looked_up, cwd=ROOT, capture_output=True).returncode == 0


def check() -> int:
    """Compare with the newest release; the exit status."""
    if not released():
        print(f"contract: nothing to compare with in {RELEASED.relative_to(ROOT)}", file=sys.stderr)
        return 1
    newest = released()[-1]
    with tempfile.TemporaryDirectory() as scratch:
        now = Path(scratch) / "now.binpb"
        build(now)
        broken = run(BUF, "breaking", str(now), "--against", str(image_of(newest)))
    print(f"contract: {'BREAKS' if broken else 'keeps'} what {newest} promises")
    return 1 if broken else 0


def release(version: str) -> int:
    """Keep the contract of a release; the exit status."""
    if not VERSION.fullmatch(version):
        print(f"contract: {version!r} is no version; give one like 0.2.0", file=sys.stderr)
        return 1
    if is_tagged(version):
        print(f"contract: v{version} is tagged, and what was released does not change", file=sys.stderr)
        return 1
    RELEASED.mkdir(exist_ok=True)
    build(image_of(version), "--exclude-source-info")
    print(f"contract: wrote {image_of(version).relative_to(ROOT)}")
    return 0


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="compare with the last release")
    commands.add_parser("release", help="keep the contract of a release").add_argument("version")
    options = parser.parse_args()
    return check() if options.command == "check" else release(options.version)


if __name__ == "__main__":
    sys.exit(main())
