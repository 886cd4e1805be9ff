"""The process in which LLVM runs: ``python object_worker.py TARGET PATH [PASS..] < MODULE``.

TARGET is a TVM target and MODULE a module, both as JSON; the object file goes to PATH. Passes that
are named are left out.
"""

import json
import sys

import tvm


def main(target: str, path: str, *left_out: str) -> None:
    module = tvm.ir.load_json(sys.stdin.read())
    with tvm.transform.PassContext(disabled_pass=left_out):
        built = tvm.tirx.build(module, target=tvm.target.Target(json.loads(target)))
    built.write_to_file(path, "o")


if __name__ == "__main__":
    main(*sys.argv[1:])
