"""ponder generate: reads, learns, continues a text."""
import os
import pty
import signal
import subprocess

from tool import harness
from tool.harness import Case, TEXT

FEW = ["--max-tokens", "24"]
READS = ["--chunk", "32", "--context", "256", "--adapter", "lora", "--policy", "always"]


class Generate(Case):
    def test_the_text_alone_is_on_standard_output(self):
        result = self.succeeds("generate", "--prompt", "import os\nimport ", *FEW)
        self.assertTrue(result.stdout.endswith(b"\n"))
        result.stdout.decode()  # valid UTF-8
        self.assertIn(b"tok/s", result.stderr)
        quiet = self.succeeds("generate", "--prompt", "import os\nimport ", *FEW, "-q")
        self.assertEqual(quiet.stdout, result.stdout)
        self.assertEqual(quiet.stderr, b"")

    def test_prompt_from_standard_input(self):
        argument = self.succeeds("generate", "--prompt", "class A:\n", *FEW)
        piped = self.succeeds("generate", "--prompt", "-", *FEW, stdin=b"class A:\n")
        self.assertEqual(argument.stdout, piped.stdout)

    def test_json(self):
        found = self.object_of("generate", "--prompt", "x = ", *FEW)
        self.assertEqual(found["command"], "generate")
        self.assertNotIn("read", found)
        self.assertEqual(found["completion"]["tokens"], 24)
        self.assertEqual(found["completion"]["ended_by"], "length")
        text = self.succeeds("generate", "--prompt", "x = ", *FEW).stdout.decode()
        self.assertEqual(found["completion"]["text"] + "\n", text)

    def test_reading_changes_what_is_completed(self):
        path = self.write("a.py", TEXT * 8)
        arguments = ["generate", "--read", path, "--prompt", "def area7(", "--compare", *FEW, *READS]
        found = self.object_of(*arguments)
        self.assertEqual(found["read"]["files"], 1)
        self.assertLess(found["read"]["loss"], found["read"]["skip_loss"])
        self.assertIn("return w * h", found["completion"]["text"])
        self.assertNotEqual(found["completion"]["text"], found["completion_without_reading"]["text"])
        alone = self.object_of("generate", "--prompt", "def area7(", *FEW, "--adapter", "none")
        self.assertEqual(alone["completion"]["text"], found["completion_without_reading"]["text"])
        result = self.succeeds(*arguments)
        self.assertIn(b"without learning", result.stderr)
        lines = result.stdout.decode().splitlines()
        self.assertRegex(lines[0], r"^without reading +\| after reading$")
        for line in lines:
            self.assertLessEqual(len(line), 100)

    def test_seeds_and_threads(self):
        def text(*arguments):
            return self.succeeds("generate", "--prompt", "def ", "--temperature", "1", *FEW,
                                 *arguments).stdout
        self.assertEqual(text("--seed", "3"), text("--seed", "3", "--threads", "1"))
        self.assertNotEqual(text("--seed", "3"), text("--seed", "4"))
        self.assertEqual(text("--top-k", "1"), self.succeeds("generate", "--prompt", "def ",
                                                              *FEW).stdout)

    def test_a_policy_that_needs_the_length_of_what_is_read(self):
        path = self.write("a.py", TEXT * 8)
        for source, stdin in ((path, b""), ("-", TEXT.encode() * 8)):
            loss = [self.object_of("generate", "--read", source, "--prompt", "x", *FEW, *READS[:-1],
                                   policy, stdin=stdin)["read"]["loss"]
                    for policy in ("skip", "first:0.5", "always")]
            self.assertLess(loss[1], loss[0])
            self.assertNotEqual(loss[1], loss[2])

    def test_seeds_in_any_form(self):
        text = [self.succeeds("generate", "--prompt", "def ", "--temperature", "1", *FEW, "--seed",
                              seed).stdout for seed in ("1000", "1e3")]
        self.assertEqual(text[0], text[1])

    def test_stop(self):
        found = self.object_of("generate", "--prompt", "def f(x):\n", "--stop", "\n", *FEW)
        self.assertEqual(found["completion"]["ended_by"], "string")
        self.assertNotIn("\n", found["completion"]["text"])

    def test_refuses(self):
        path = self.write("a.py", TEXT)
        self.assertIn("--compare", self.fails(2, "generate", "--compare"))
        self.assertIn("standard input",
                      self.fails(2, "generate", "--read", "-", "--prompt", "-"))
        self.assertIn("top-p", self.fails(2, "generate", "--top-p", "1.5"))
        self.assertIn("no-such", self.fails(3, "generate", "--read", self.path("no-such")))
        self.assertIn("repetition", self.fails(2, "generate", "--repeat-penalty", "0.001"))
        self.assertTrue(os.path.exists(path))

    def test_a_terminal_shows_the_prompt_too(self):
        master, slave = pty.openpty()
        process = subprocess.Popen([harness.TOOL, "generate", "--prompt", "import ", "-q", *FEW],
                                   stdout=slave, env=dict(os.environ, NO_COLOR="1"))
        os.close(slave)
        seen = b""
        try:
            while chunk := os.read(master, 4096):
                seen += chunk
        except OSError:
            pass
        process.wait()
        os.close(master)
        self.assertTrue(seen.startswith(b"import "), seen)

    def test_interrupted(self):
        process = subprocess.Popen([harness.TOOL, "generate", "--prompt", "a", "--max-tokens",
                                    "1000000", "--temperature", "1"], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        self.assertTrue(process.stdout.read(1))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130)
