"""Progress, colours and SIGINT."""
import json
import os
import pty
import signal
import subprocess

from tool import harness
from tool.harness import Case, SMALL, TEXT


def read_terminal(fd, until=None):
    """What was written to a pseudo terminal, to its end or until a text was seen."""
    seen = b""
    while until is None or until not in seen:
        try:
            block = os.read(fd, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not block:
            break
        seen += block
    return seen


class Terminal(Case):
    def start(self, arguments, **keywords):
        """The tool with its stderr on a pseudo terminal."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        env = dict(os.environ, TERM="xterm")
        process = subprocess.Popen([harness.TOOL, *arguments], stderr=slave, stdout=subprocess.PIPE,
                                   env=env, **keywords)
        os.close(slave)
        return process, master

    def test_progress_only_on_a_terminal(self):
        path = self.write("a", TEXT)
        process, master = self.start(["run", path, *SMALL])
        seen = read_terminal(master)
        out = process.communicate()[0]
        self.assertEqual(process.returncode, 0)
        self.assertRegex(seen, rb"adapting \[[#.]+\].*tok/s.*loss.*updates.*ETA")
        self.assertTrue(seen.endswith(b"\r\x1b[K"))  # nothing stays behind
        self.assertNotIn(b"adapting", out)
        self.assertNotIn(b"adapting", self.succeeds("run", path, *SMALL).stderr)

    def test_quiet_on_a_terminal(self):
        path = self.write("a", TEXT)
        process, master = self.start(["run", path, "-q", *SMALL])
        self.assertEqual(read_terminal(master), b"")
        process.communicate()

    def test_colour_only_if_wanted(self):
        path = self.write("a", TEXT)
        seen = []
        for extra in [{}, {"NO_COLOR": "1"}]:
            env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
            env.update(TERM="xterm", **extra)
            master, slave = pty.openpty()
            command = [harness.TOOL, "run", path, "-q", *SMALL]
            process = subprocess.Popen(command, stdout=slave, env=env)
            os.close(slave)
            seen.append(read_terminal(master))
            process.wait()
            os.close(master)
        self.assertIn(b"\x1b[34m", seen[0])
        self.assertNotIn(b"\x1b[", seen[1])

    def interrupt(self, command, **keywords):
        process, master = self.start(command, **keywords)
        read_terminal(master, until=b"loss")
        process.send_signal(signal.SIGINT)
        read_terminal(master)
        out = process.communicate(timeout=120)[0]
        self.assertEqual(process.returncode, 130)
        return json.loads(out)

    def test_interrupted_run_reports_what_was_done(self):
        path = self.write("a", TEXT * 2000)
        found = self.interrupt(["run", path, "--json", "--chunk", "64"])
        self.assertFalse(found["complete"])
        self.assertGreater(found["adapted"]["chunks"], 0)
        self.assertGreater(found["adapted"]["loss"], 0)

    def test_interrupted_eval_reports_what_was_done(self):
        line = json.dumps({"package": "a", "path": "", "text": TEXT * 100}) + "\n"
        path = self.write("s.jsonl", line)
        found = self.interrupt(["eval", "--stream", path, "--json", "--chunk", "64",
                                "--max-chunks", "100000"])
        self.assertFalse(found["complete"])
        self.assertGreater(found["chunks"], 0)

    def test_interrupted_while_reading_standard_input(self):
        read_end, write_end = os.pipe()
        process, master = self.start(["run", "-", "-q"], stdin=read_end)
        os.close(read_end)
        os.write(write_end, b"text")
        try:
            process.wait(timeout=4)  # it loads the model and waits for more
        except subprocess.TimeoutExpired:
            pass
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        os.close(write_end)
        self.assertEqual(process.returncode, 130)
