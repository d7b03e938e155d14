"""The inside of a worker process: runs one opponent, a JSON object a line.

    python -P serve.py OPPONENT.py DIRECTORY

Reads {"command": name, **arguments} from standard input and answers {"result": ...,
"peak_bytes": ...} or {"error": ...} on standard output. Uses the standard library
alone, since every environment runs it. The opponent is loaded by its path, so that a
file called transformers.py does not hide the library.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import traceback

PACKAGES = ("recurrentgemma", "jax", "jaxlib", "flax", "transformers", "torch")


def load_opponent(path: str, directory: str):
    spec = importlib.util.spec_from_file_location("opponent", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Opponent(directory)


def reset_peak_memory() -> None:
    """Starts the kernel's high-water mark of this process again (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_memory_bytes() -> int | None:
    try:
        with open("/proc/self/status") as file:
            found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def versions() -> dict[str, str]:
    """Versions of the packages of this environment that decide what is measured."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def answer(opponent, request: dict) -> dict:
    command = request.pop("command")
    reset_peak_memory()
    try:
        if command == "versions":
            result = versions()
        else:
            result = getattr(opponent, command)(**request)
    except Exception as error:  # noqa: BLE001 - what it means is the caller's matter
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"result": result, "peak_bytes": peak_memory_bytes()}


def main(path: str, directory: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    opponent = load_opponent(path, directory)
    for line in sys.stdin:
        print(json.dumps(answer(opponent, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
