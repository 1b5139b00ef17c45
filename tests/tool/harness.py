"""What the tests of the tool share: running it, and a folder for each test."""
import json
import os
import shutil
import subprocess
import tempfile
import unittest

TOOL = ""  # set by tool_test.py
SMALL = ["--chunk", "16", "--context", "16", "--set", "lora.rank=2", "--set", "lora.layers=last:1"]
TEXT = "".join(f"def area{i}(w, h):\n    return w * h\n\n" for i in range(12))


def ponder(*arguments, stdin=b"", cwd=None, environment=None):
    env = dict(os.environ, **(environment or {}))
    return subprocess.run([TOOL, *arguments], input=stdin, cwd=cwd, env=env, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="ponder-tool-")
        self.addCleanup(shutil.rmtree, self.folder)

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, content=b"text\n"):
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        return path

    def succeeds(self, *arguments, **keywords):
        result = ponder(*arguments, **keywords)
        self.assertEqual(result.returncode, 0, result.stderr.decode(errors="replace"))
        return result

    def object_of(self, *arguments, **keywords):
        return json.loads(self.succeeds(*arguments, "--json", **keywords).stdout)

    def fails(self, code, *arguments, **keywords):
        result = ponder(*arguments, **keywords)
        self.assertEqual(result.returncode, code, result.stderr.decode(errors="replace"))
        self.assertEqual(result.stdout, b"")
        message = result.stderr.decode(errors="replace")
        self.assertRegex(message, r"\Aponder: [^\n]+\n\Z")
        return message

    def listed(self, *paths):
        """Names that a run in the folder would read, in order."""
        out = self.succeeds("run", "--list", *paths, cwd=self.folder).stdout
        return os.fsdecode(out).splitlines()
