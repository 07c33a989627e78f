"""Generate the Python code of the contract into the client package, or check that it is fresh.

    python tools/generate.py            write clients/python/lda_client/gen
    python tools/generate.py --check    exit 1 if what is committed differs

protoc writes absolute imports (`from lda.v1 import ...`). The generated code lives inside the package
`lda_client.gen`, so that no top-level package `lda` or `buf` is installed; the import lines are prefixed here.
"""

import argparse
import filecmp
import re
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "clients/python/lda_client/gen"
PACKAGE = "lda_client.gen"
INCLUDES = [ROOT / "proto", ROOT / "third_party/protovalidate", ROOT / "third_party/googleapis"]
SERVICES = [f"lda/v1/{name}_service.proto" for name in ("lda", "completion", "admin")]
MESSAGES = [*SERVICES, "buf/validate/validate.proto"]
ABSOLUTE_IMPORT = re.compile(r"^(\s*)(from|import) (lda|buf)\b(?=[. ])", re.MULTILINE)
QUALIFIED_NAME = re.compile(r"(?<![\w./\"'])((?:lda|buf)\.\w+\.\w+_pb2)\b")


def run_protoc(out: Path) -> None:
    """Run protoc with all generators into `out`; raises SystemExit on a fault in the contract."""
    well_known = files("grpc_tools").joinpath("_proto")
    includes = [f"-I{path}" for path in [*INCLUDES, well_known]]
    messages = [f"--python_out={out}", f"--mypy_out=quiet:{out}"]
    services = [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"]
    for options, protos in ((messages, MESSAGES), (services, SERVICES)):
        if protoc.main(["protoc", *includes, *options, *protos]):
            raise SystemExit("protoc failed: see the lines above")


def move_into_package(out: Path) -> None:
    """Prefix the imports of generated modules with the package they live in and add `__init__` files."""
    for path in [*out.rglob("*.py"), *out.rglob("*.pyi")]:
        text = ABSOLUTE_IMPORT.sub(rf"\1\2 {PACKAGE}.\3", path.read_text())
        path.write_text(QUALIFIED_NAME.sub(rf"{PACKAGE}.\1", text) if path.suffix == ".pyi" else text)
    for folder in [out, *(path for path in out.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").write_text('"""Generated from the contract by tools/generate.py. Do not edit."""\n')


def generated_files(folder: Path) -> set[str]:
    """Relative names of the source files below `folder`."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py*") if path.suffix in (".py", ".pyi")}


def is_fresh(out: Path) -> bool:
    """Whether the committed files equal the ones just generated."""
    names = generated_files(out)
    _, different, missing = filecmp.cmpfiles(out, TARGET, names, shallow=False)
    return names == generated_files(TARGET) and not different and not missing


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if the committed code is stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "gen"
        out.mkdir()
        run_protoc(out)
        move_into_package(out)
        if check:
            fresh = is_fresh(out)
            print("generated code is fresh" if fresh else "generated code is stale: run `make generate` and commit")
            return 0 if fresh else 1
        shutil.rmtree(TARGET, ignore_errors=True)
        shutil.copytree(out, TARGET)
    print(f"wrote {len(generated_files(TARGET))} files to {TARGET.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
