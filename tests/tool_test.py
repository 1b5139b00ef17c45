#!/usr/bin/env python3
"""End-to-end tests of the ponder tool: tool_test.py PATH_OF_TOOL [-k PART_OF_NAME].

Only the standard library. Short chunks keep every run below a second or so.
"""
import os
import sys
import unittest

sys.dont_write_bytecode = True  # the source tree stays as it is
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from tool import harness  # noqa: E402 (the path comes first)


def load_tests(loader, tests, pattern):
    folder = os.path.dirname(os.path.abspath(__file__))
    return loader.discover(os.path.join(folder, "tool"), top_level_dir=folder)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: tool_test.py PATH_OF_TOOL [-k PART_OF_NAME]")
    harness.TOOL = os.path.abspath(sys.argv.pop(1))
    unittest.main(verbosity=2)
