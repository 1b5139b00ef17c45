#!/usr/bin/env python3
"""End-to-end tests of the ponder tool: tool_test.py PATH_OF_TOOL [unittest arguments].

Only the standard library. Short chunks keep every run below a second or so.
"""
import html.parser
import json
import lzma
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

TOOL = ""
SMALL = ["--chunk", "16", "--context", "16", "--set", "lora.rank=2", "--set", "lora.layers=last:1"]
TEXT = "".join(f"def area{i}(w, h):\n    return w * h\n\n" for i in range(12))


def ponder(*arguments, stdin=b"", cwd=None, environment=None):
    env = dict(os.environ, **(environment or {}))
    return subprocess.run([TOOL, *arguments], input=stdin, cwd=cwd, env=env, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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


class Walk(Case):
    def test_order_is_by_name_at_every_level(self):
        for name in ["b/z", "b/a", "B", "a", "c", "b.txt"]:
            self.write(name)
        self.assertEqual(self.listed(), ["B", "a", "b/a", "b/z", "b.txt", "c"])

    def test_paths_are_read_in_the_order_given(self):
        for name in ["x/1", "x/2", "y"]:
            self.write(name)
        self.assertEqual(self.listed("y", "x"), ["y", "x/1", "x/2"])

    def test_current_folder_without_a_path(self):
        self.write("only.txt")
        self.assertEqual(self.listed(), ["only.txt"])

    def test_git_folder_is_left_out(self):
        self.write(".git/config")
        self.write("sub/.git")  # a worktree has a file of that name
        self.write(".hidden")
        self.assertEqual(self.listed(), [".hidden"])

    def test_binary_files_are_left_out(self):
        self.write("image", b"\x89PNG\0\0")
        self.write("late", b"a" * 8000 + b"\0")  # git looks at 8,000 bytes
        self.write("text")
        self.assertEqual(self.listed(), ["late", "text"])

    def test_bytes_that_are_no_utf8_are_text(self):
        self.write("latin1", b"caf\xe9\n")
        self.assertEqual(self.listed(), ["latin1"])

    def test_too_large_file_is_left_out_with_a_note(self):
        with open(self.path("large"), "wb") as file:
            file.truncate((64 << 20) + 1)
        self.write("small")
        result = self.succeeds("run", "--list", cwd=self.folder)
        self.assertEqual(result.stdout, b"small\n")
        self.assertIn(b"larger than 64.0 MiB", result.stderr)

    def test_symbolic_links_are_not_followed_below_a_folder(self):
        self.write("folder/file")
        os.symlink(".", self.path("folder/loop"))
        os.symlink("file", self.path("folder/link"))
        self.assertEqual(self.listed("folder"), ["folder/file"])
        self.assertEqual(self.listed("folder/link"), ["folder/link"])

    def test_list_as_json(self):
        self.write("a", "12345")
        found = self.object_of("run", "--list", cwd=self.folder)
        self.assertEqual(found["files"], [{"path": "a", "bytes": 5}])


class Ignore(Case):
    def check(self, rules, files, kept):
        """Rules by folder; the result is also compared with git's, where there is git."""
        for folder, text in rules.items():
            self.write(os.path.join(folder, ".gitignore"), text)
        for name in files:
            self.write(name)
        kept = sorted(kept)
        found = sorted(name for name in self.listed() if not name.endswith(".gitignore"))
        self.assertEqual(found, kept)
        if shutil.which("git"):
            env = dict(os.environ, GIT_CONFIG_GLOBAL="/dev/null", GIT_CONFIG_SYSTEM="/dev/null")
            subprocess.run(["git", "init", "-q"], cwd=self.folder, env=env, check=True)
            git = subprocess.run(["git", "ls-files", "-z", "--others", "--exclude-standard"],
                                 cwd=self.folder, env=env, check=True, stdout=subprocess.PIPE)
            names = os.fsdecode(git.stdout).split("\0")[:-1]
            self.assertEqual(sorted(n for n in names if not n.endswith(".gitignore")), kept)

    def test_names_at_every_level(self):
        self.check({"": "*.o\ntarget\n"}, ["a.o", "s/b.o", "s/target", "target/x", "a.c", "s/o"],
                   ["a.c", "s/o"])

    def test_negation_and_last_pattern_wins(self):
        self.check({"": "*.log\n!keep.log\nkeep.log.*\n"},
                   ["a.log", "keep.log", "s/keep.log", "keep.log.1"], ["keep.log", "s/keep.log"])

    def test_nothing_below_an_ignored_folder_comes_back(self):
        self.check({"": "build/\n!build/keep\n"}, ["build/keep", "build/x", "s/build"], ["s/build"])

    def test_folder_content_with_an_exception(self):
        self.check({"": "/out/*\n!/out/keep\n"}, ["out/keep", "out/x", "s/out/x"],
                   ["out/keep", "s/out/x"])

    def test_anchored_by_a_slash_in_front_or_inside(self):
        self.check({"": "/top\ndoc/api\n"}, ["top", "s/top", "doc/api", "s/doc/api"],
                   ["s/top", "s/doc/api"])

    def test_nested_files_win_over_outer_ones(self):
        self.check({"": "*.txt\n", "s": "!b.txt\n/c\n", "s/t": "b.txt\n"},
                   ["a.txt", "s/a.txt", "s/b.txt", "s/t/b.txt", "s/c", "c", "s/t/c"],
                   ["s/b.txt", "c", "s/t/c"])

    def test_two_stars(self):
        self.check({"": "**/cache\na/**/z\nlogs/**\n!logs/\n"},
                   ["cache/x", "s/cache/x", "a/z", "a/b/z", "a/b/c/z", "b/a/z", "logs/x", "logs/s/y",
                    "s/logs/x"], ["b/a/z", "s/logs/x"])

    def test_sets_and_question_marks(self):
        self.check({"": "f[0-9]\ng[!a-c]\nh?\n[[:upper:]]x\nk[]]\nm[a\n"},
                   ["f1", "fa", "ga", "gd", "h", "h1", "h12", "Ax", "ax", "k]", "m[a"],
                   ["fa", "ga", "h", "h12", "ax", "m[a"])

    def test_comments_escapes_and_trailing_spaces(self):
        self.check({"": "# a\n\\#b\n\\!c\nd  \ne\\ \n\\*\nf\r\n\n"},
                   ["# a", "#b", "!c", "d", "e ", "e", "*", "star", "f"], ["# a", "e", "star"])

    def test_only_folders(self):
        self.check({"": "x/\n"}, ["a/x", "x/y", "b/x/y"], ["a/x"])

    def test_files_above_count_inside_a_repository(self):
        self.write(".git/HEAD")
        self.write(".gitignore", "*.tmp\n/s/only\n")
        for name in ["s/a.tmp", "s/a", "s/only", "s/t/only"]:
            self.write(name)
        self.assertEqual(self.listed("s"), ["s/a", "s/t/only"])

    def test_files_above_do_not_count_elsewhere(self):
        self.write(".gitignore", "*.tmp\n")
        self.write("s/a.tmp")
        self.assertEqual(self.listed("s"), ["s/a.tmp"])

    def test_a_named_file_is_read_whatever_is_ignored(self):
        self.write(".gitignore", "a\n")
        self.write("a")
        self.assertEqual(self.listed("a"), ["a"])

    def test_many_stars_do_not_take_long(self):
        self.write(".gitignore", "*a" * 40 + "b\n" + "**/a/" * 40 + "b\n")
        self.write("a" * 200)
        self.write("a/" * 60 + "c")
        self.assertEqual(len(self.listed()), 3)


class Run(Case):
    KEYS = ["schema_version", "method", "backend", "isa", "dtype", "model", "causal", "complete",
            "files", "files_left_out", "bytes", "chunk_tokens", "context_tokens", "adapted", "skip",
            "gain", "time_ratio", "updates", "steps", "update_rate", "cost", "rollbacks",
            "by_position", "records", "options"]

    def test_json_has_all_keys_and_agrees_with_itself(self):
        path = self.write("a.py", TEXT)
        found = self.object_of("run", path, *SMALL)
        for key in self.KEYS:
            self.assertIn(key, found)
        records = found["records"]
        self.assertEqual(found["adapted"]["chunks"], len(records))
        self.assertEqual(found["adapted"]["tokens"], sum(r["tokens"] for r in records))
        self.assertEqual(found["skip"]["tokens"], found["adapted"]["tokens"])
        weight = sum(r["tokens"] - 1 for r in records)
        for name, key in [("adapted", "loss"), ("skip", "skip_loss")]:
            mean = sum(r[key] * (r["tokens"] - 1) for r in records) / weight
            self.assertAlmostEqual(mean, found[name]["loss"], 5)
        gain = found["skip"]["loss"] - found["adapted"]["loss"]
        self.assertAlmostEqual(found["gain"]["nats"], gain, 6)
        self.assertGreater(gain, 0)  # the text repeats itself
        self.assertEqual(found["updates"], len(records))
        self.assertEqual(len(found["by_position"]), 8)
        self.assertEqual(records[0]["loss"], records[0]["skip_loss"])  # nothing learned yet
        self.assertTrue(found["complete"])
        self.assertEqual(found["options"]["lora.rank"], "2")

    def test_the_last_short_chunk_is_scored(self):
        path = self.write("a.py", TEXT)
        found = self.object_of("run", path, *SMALL)
        last = found["records"][-1]["tokens"]
        self.assertTrue(2 <= last <= 16)
        self.assertEqual(last, found["adapted"]["tokens"] - 16 * (len(found["records"]) - 1))

    def test_files_and_standard_input_give_the_same_stream(self):
        path = self.write("a.py", TEXT)
        file = self.object_of("run", path, *SMALL, "--no-baseline")
        piped = self.object_of("run", "-", *SMALL, "--no-baseline", stdin=TEXT.encode())
        self.assertEqual(file["adapted"]["loss"], piped["adapted"]["loss"])
        self.assertEqual(piped["files"], 1)

    def test_without_baseline(self):
        found = self.object_of("run", "-", *SMALL, "--no-baseline", stdin=TEXT.encode())
        self.assertNotIn("skip", found)
        self.assertIsNone(found["records"][0]["skip_loss"])

    def test_table(self):
        result = self.succeeds("run", "-", *SMALL, stdin=TEXT.encode())
        text = result.stdout.decode()
        for part in ["SKIP", "adapted", "perplexity", "Loss by position", "Updates:", "GFLOP",
                     "tokens/s", "times SKIP"]:
            self.assertIn(part, text)
        self.assertLessEqual(max(len(line) for line in text.splitlines()), 80)
        self.assertNotIn("\033", text)

    def test_full_context_is_the_default(self):
        found = self.object_of("run", "-", "--chunk", "64", "--adapter", "none", "--no-baseline",
                               stdin=TEXT.encode())
        self.assertEqual(found["context_tokens"], 1024)
        self.assertEqual(found["options"]["context"], "0")
        self.assertEqual(found["options"]["guard.norm"], "16")

    def test_policy_that_needs_the_length(self):
        found = self.object_of("run", "-", *SMALL, "--policy", "first:0.5", "--no-baseline",
                               stdin=TEXT.encode())
        updated = [r["updated"] for r in found["records"]]
        half = (len(updated) + 1) // 2
        self.assertEqual(updated, [True] * half + [False] * (len(updated) - half))

    def test_set_wins_over_the_flag(self):
        found = self.object_of("run", "-", *SMALL, "--steps", "2", "--set", "steps=0",
                               "--no-baseline", stdin=TEXT.encode())
        self.assertEqual((found["steps"], found["options"]["steps"]), (0, "0"))

    def test_only_binary_files(self):
        path = self.write("b", b"\0\0")
        self.assertIn("nothing to read", self.fails(3, "run", path, *SMALL, "-q"))

    def test_quiet(self):
        result = self.succeeds("run", "-", *SMALL, "--quiet", stdin=TEXT.encode())
        self.assertEqual(result.stderr, b"")


class PageReader(html.parser.HTMLParser):
    """Checks that tags nest, and collects the tokens' text without the marks for bytes."""
    VOID = {"meta", "line", "rect", "circle", "polyline"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.marks, self.errors = [], "", [], []
        self.scripts = self.tokens = 0

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        self.tokens += tag == "i"
        for name, value in attributes:
            if name in ("src", "href") or name.startswith("on") or "url(" in (value or ""):
                self.errors.append((tag, name, value))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if tag in ("p", "li") or not self.open or self.open[-1] != tag:
            if not self.open or self.open[-1] != tag:
                self.errors.append(("unbalanced", tag, list(self.open)))
                return
        self.open.pop()

    def handle_data(self, data):
        if "pre" in self.open and "i" in self.open:
            if "u" in self.open:
                self.marks.append(data)
            else:
                self.text += data


class Page(Case):
    def page(self, content, *arguments):
        path = self.write("stream", content)
        target = self.path("page.html")
        self.succeeds("run", path, *SMALL, "--html", target, *arguments)
        with open(target, encoding="utf-8") as file:  # strict: the page itself is valid UTF-8
            return file.read()

    def test_self_contained_and_escaped(self):
        text = "x = \"<script>alert('1')</script>\" & 'y' # http://example.org\n" * 3
        page = self.page(text)
        reader = PageReader()
        reader.feed(page)
        self.assertEqual(reader.errors, [])
        self.assertEqual(reader.open, [])
        self.assertEqual(reader.scripts, 1)
        self.assertNotIn("@import", page)
        self.assertNotRegex(re.sub(r"<pre.*?</pre>", "", page, flags=re.S), r"https?:")
        self.assertEqual(reader.text, "<|endoftext|>" + text)

    def test_bytes_and_control_characters_are_visible(self):
        page = self.page(b"caf\xe9 \x1b[0m \xe2\x80\xaegnp \x7f\n" * 4)
        reader = PageReader()
        reader.feed(page)
        for mark in ["\\xe9", "\u241b", "U+202E", "\u2421", "\u21b5"]:
            self.assertIn(mark, reader.marks)
        for raw in ["\x1b", "\u202e", "\x7f"]:
            self.assertNotIn(raw, page)

    def test_characters_spread_over_tokens_are_whole(self):
        text = "\u6f22\u5b57 \U0001f600 na\u00efve\n"
        reader = PageReader()
        reader.feed(self.page(text))
        self.assertIn("<|endoftext|>" + text.split()[0], reader.text)
        self.assertIn("\U0001f600", reader.text)

    def test_every_token_has_its_losses(self):
        page = self.page(TEXT)
        chunks = page.count("<pre")
        tokens = page.count("<i")
        self.assertEqual(len(re.findall(r'data-l="\d+\.\d\d \d+\.\d\d"', page)), tokens - chunks)
        self.assertRegex(page, r"class=e[1-4]")

    def test_gate_scores_are_drawn(self):
        page = self.page(TEXT, "--policy", "threshold:loss:1.5")
        self.assertIn("class=gate", page)
        self.assertIn("class=limit", page)

    def test_without_baseline(self):
        page = self.page(TEXT, "--no-baseline")
        self.assertNotIn("class=e", page)
        self.assertIn("no SKIP pass", page)

    def test_page_that_cannot_be_written(self):
        path = self.write("a", TEXT)
        self.fails(3, "run", path, *SMALL, "-q", "--html", self.path("no/such/folder.html"))


class Eval(Case):
    KEYS = ["method", "backend", "isa", "dtype", "chunks", "predictions", "loss", "updates", "steps",
            "update_rate", "cost", "flops", "seconds", "tokens_per_second", "peak_rss_bytes",
            "by_position", "packages", "causal"]

    def stream(self, packages, name="s.jsonl"):
        lines = [json.dumps({"package": package, "path": f"{i}", "text": text}) + "\n"
                 for package, texts in packages for i, text in enumerate(texts)]
        content = "".join(lines).encode()
        return self.write(name, lzma.compress(content) if name.endswith(".xz") else content)

    def test_counts(self):
        # A document without text is one token, the end-of-text id: the counts are exact.
        path = self.stream([("seven", [""] * 63), ("eight", [""] * 71), ("many", [""] * 400)])
        found = self.object_of("eval", "--stream", path, "--chunk", "8", "--max-chunks", "10",
                               "--set", "lora.rank=1")
        for key in self.KEYS:
            self.assertIn(key, found)
        self.assertEqual([(p["name"], p["chunks"]) for p in found["packages"]],
                         [("eight", 8), ("many", 10)])
        self.assertEqual(found["chunks"], 18)
        self.assertEqual(found["predictions"], 18 * 7)
        self.assertEqual(found["packages_skipped"], 1)
        self.assertEqual(len(found["by_position"]), 3)
        self.assertEqual((found["updates"], found["steps"], found["cost"]), (18, 18, 1.0))
        total = sum(p["loss"] * p["chunks"] for p in found["packages"]) / 18
        self.assertAlmostEqual(found["loss"], total, 9)
        places = found["by_position"]
        self.assertAlmostEqual(found["loss"], (8 * places[0] + 8 * places[1] + 2 * places[2]) / 18, 9)
        self.assertAlmostEqual(found["tokens_per_second"] * found["seconds"], 18 * 8, 3)
        self.assertTrue(found["causal"])

    def test_defaults_of_the_instrument(self):
        path = self.stream([("a", [TEXT])])
        found = self.object_of("eval", "--stream", path, "--chunk", "16", "--set", "lora.rank=1")
        options = found["options"]
        self.assertEqual((options["context"], options["guard.norm"], options["budget.rate"]),
                         ("16", "inf", "inf"))
        self.assertEqual(found["method"], "lora always")
        again = self.object_of("eval", "--stream", path, "--chunk", "16", "--set", "lora.rank=1",
                               "--context", "32", "--set", "guard.norm=3", "--steps", "2")
        self.assertEqual((again["options"]["context"], again["options"]["guard.norm"]), ("32", "3"))
        self.assertEqual(again["method"], "lora always, 2 steps")

    def test_packages_start_fresh(self):
        path = self.stream([("a", [TEXT, TEXT]), ("b", [TEXT, TEXT])])
        found = self.object_of("eval", "--stream", path, *SMALL, "--policy", "random:0.5")
        first, second = found["packages"]
        self.assertEqual(first["loss"], second["loss"])

    def test_xz_gives_the_same(self):
        packages = [("a", [TEXT])]
        results = [self.object_of("eval", "--stream", self.stream(packages, name), *SMALL)
                   for name in ["s.jsonl", "s.jsonl.xz"]]
        self.assertEqual(results[0]["loss"], results[1]["loss"])
        self.assertEqual(results[0]["flops"], results[1]["flops"])

    def test_concatenated_xz(self):
        half = json.dumps({"package": "a", "path": "", "text": TEXT}).encode() + b"\n"
        path = self.write("s.xz", lzma.compress(half) + lzma.compress(half))
        plain = self.write("s", half + half)
        found, expected = [self.object_of("eval", "--stream", p, *SMALL) for p in (path, plain)]
        self.assertEqual(found["packages"], expected["packages"])

    def test_policy_that_needs_the_length(self):
        path = self.stream([("a", [""] * 80)])
        found = self.object_of("eval", "--stream", path, "--chunk", "8", "--policy", "first:0.5")
        self.assertEqual((found["chunks"], found["updates"], found["cost"]), (10, 5, 0.5))

    def test_frozen(self):
        path = self.stream([("a", [TEXT])])
        found = self.object_of("eval", "--stream", path, *SMALL, "--adapter", "none")
        self.assertEqual((found["method"], found["updates"], found["steps"]), ("skip", 0, 0))

    def test_table_for_people(self):
        path = self.stream([("a", [TEXT])])
        out = self.succeeds("eval", "--stream", path, *SMALL).stdout.decode()
        for part in ["loss", "nats/token", "package", "by position", "peak memory"]:
            self.assertIn(part, out)

    def test_malformed_lines_name_file_and_line(self):
        good = '{"package": "a", "path": "p", "text": "t"}\n'
        for bad, what in [("{\n", "no valid JSON"), ("[]\n", "no object"), ("3\n", "no object"),
                          ('{"package": "a", "path": "p"}\n', '"text" is missing'),
                          ('{"path": "p", "text": "t"}\n', '"package" is missing'),
                          ('{"package": 1, "path": "p", "text": "t"}\n', '"package" is no string'),
                          ('{"package": "a", "text": "t", "text": "u"}\n', "twice"),
                          (good.strip() + "x\n", "no valid JSON"),
                          ('{"a": ' + "[" * 100000 + "\n", "no valid JSON")]:
            with self.subTest(bad=bad[:40]):
                path = self.write("bad.jsonl", good + "\n" + bad)
                message = self.fails(3, "eval", "--stream", path, *SMALL, "-q")
                self.assertIn("bad.jsonl:3: ", message)
                self.assertIn(what, message)

    def test_text_that_is_no_utf8(self):
        path = self.write("bad.jsonl", b'{"package": "a", "path": "", "text": "\xff"}\n')
        self.assertIn("bad.jsonl:1: ", self.fails(3, "eval", "--stream", path, *SMALL, "-q"))

    def test_other_members_and_escapes_are_fine(self):
        line = '{"extra": {"text": [1, null]}, "package": "a", "text": "\\u00e9\\n", "path": ""}\n'
        path = self.write("s.jsonl", line * 60)
        self.assertEqual(self.object_of("eval", "--stream", path, *SMALL)["packages"][0]["name"], "a")

    def test_damaged_xz(self):
        data = lzma.compress(json.dumps({"package": "a", "path": "", "text": TEXT}).encode())
        self.assertIn("too early", self.fails(3, "eval", "-q", "--stream", self.write("cut.xz", data[:-20])))
        broken = data[:30] + bytes([data[30] ^ 0xff]) + data[31:]
        self.assertIn("damaged", self.fails(3, "eval", "-q", "--stream", self.write("bad.xz", broken)))

    def test_no_package_is_long_enough(self):
        path = self.stream([("a", ["short"])])
        self.assertIn("no package", self.fails(3, "eval", "--stream", path, "-q"))


class OtherCommands(Case):
    def test_info(self):
        found = self.object_of("info")
        self.assertEqual(found["model"]["architecture"], "gpt2")
        self.assertEqual(found["model"]["parameters"], 10257408)
        plan = found["memory_plan"]
        self.assertGreater(plan["weights"], 10257408)
        self.assertEqual(plan["total"], sum(plan[key] for key in [
            "weights", "packed_weights", "fast_weights", "optimizer", "activations", "workspace"]))
        self.assertEqual(found["options"]["adapter"], "lora")

    def test_info_of_the_plan_alone(self):
        found = self.object_of("info", "--plan-only", "--adapter", "none")
        self.assertNotIn("model", found)
        self.assertEqual(found["memory_plan"]["fast_parameters"], 0)
        out = self.succeeds("info", "--plan-only").stdout.decode()
        self.assertIn("Memory plan", out)

    def test_backends(self):
        found = self.object_of("backends")
        reference = [b for b in found["backends"] if b["name"] == "reference"]
        self.assertEqual(len(reference), 1)
        self.assertTrue(reference[0]["available"])
        self.assertEqual(reference[0]["dtypes"][0], "f32")
        self.assertIn("reference", self.succeeds("backends").stdout.decode())

    def test_backends_say_why_not(self):
        self.write("ponder-broken.so", "no ELF file")
        found = self.object_of("backends", "--backend-path", self.folder)
        broken = [b for b in found["backends"] if not b["available"] and "broken" in b["path"]]
        self.assertEqual(len(broken), 1)
        self.assertTrue(broken[0]["reason"])
        self.assertIn(broken[0]["reason"],
                      self.succeeds("backends", "--backend-path", self.folder).stdout.decode())

    def test_bench(self):
        found = self.object_of("bench", "--chunk", "16", "--chunks", "2", "--repeats", "2")
        for side in ["skip", "update"]:
            for key in ["tokens_per_second", "gflops_per_second", "share_of_matrix_rate"]:
                self.assertGreater(found[side][key], 0)
        self.assertGreater(found["update_over_skip"], 0)
        self.assertAlmostEqual(sum(entry["share"] for entry in found["profile"]), 1, 6)
        self.assertIn("linear", [entry["op"] for entry in found["profile"]])
        self.assertEqual({entry["where"] for entry in found["profile"]}, {"score", "learn"})

    def test_bench_table(self):
        out = self.succeeds("bench", "--chunk", "16", "--chunks", "1", "--repeats", "1").stdout
        self.assertIn(b"times SKIP", out)

    def test_help_teaches(self):
        out = self.succeeds("--help").stdout.decode()
        for part in ["run", "eval", "info", "backends", "bench", "Exit status", "130"]:
            self.assertIn(part, out)
        out = self.succeeds("run", "--help").stdout.decode()
        for part in ["--policy", "lora.rank=16", "--set", "Examples", "threshold:SIGNAL:X"]:
            self.assertIn(part, out)
        self.assertIn("context", self.succeeds("eval", "--help").stdout.decode())

    def test_help_fits_a_narrow_terminal(self):
        for command in [[], ["run"], ["eval"], ["info"], ["backends"], ["bench"]]:
            out = self.succeeds(*command, "--help").stdout.decode()
            self.assertLessEqual(max(len(line) for line in out.splitlines()), 88)

    def test_version(self):
        self.assertRegex(self.succeeds("--version").stdout, rb"\Aponder \d+\.\d+\.\d+\n\Z")


class ExitCodes(Case):
    def test_usage(self):
        path = self.write("a", TEXT)
        for arguments in [[], ["frobnicate"], ["run", "--nonsense"], ["run", "--steps"],
                          ["run", path, "--steps", "x"], ["run", path, "--steps", "999"],
                          ["run", path, "--set", "lora.rank"], ["run", path, "--set", "no.such=1"],
                          ["run", path, "--policy", "sometimes"], ["run", path, "--dtype", "f64"],
                          ["run", path, "--threads", "9999"], ["eval"],
                          ["run", path, "--memory-limit", "lots"],
                          ["run", path, "--chunk", "4096"]]:
            with self.subTest(arguments=arguments):
                self.fails(2, *arguments, *(["-q"] if arguments else []))

    def test_files(self):
        path = self.write("a", TEXT)
        self.write("model/config.json", "{}")
        for arguments in [["run", self.path("none")], ["run", path, "--model", self.path("none")],
                          ["run", path, "--model", self.path("model")],
                          ["eval", "--stream", self.path("none")],
                          ["eval", "--stream", self.folder],
                          ["info", "--model", self.path("none")]]:
            with self.subTest(arguments=arguments):
                self.fails(3, *arguments, "-q")

    def test_backend(self):
        path = self.write("a", TEXT)
        for command in [["run", path], ["info"], ["bench"]]:
            message = self.fails(4, *command, "--backend", "abacus", "-q")
            self.assertIn("abacus", message)

    def test_memory(self):
        path = self.write("a", TEXT)
        self.fails(5, "run", path, "--memory-limit", "1M", "-q")

    def test_standard_output_that_cannot_be_written(self):
        with open("/dev/full", "wb") as full:
            result = subprocess.run([TOOL, "backends"], stdout=full, stderr=subprocess.PIPE)
        self.assertEqual(result.returncode, 1)


class Terminal(Case):
    def start(self, arguments, **keywords):
        """The tool with its stderr on a pseudo terminal."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        env = dict(os.environ, TERM="xterm")
        process = subprocess.Popen([TOOL, *arguments], stderr=slave, stdout=subprocess.PIPE,
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
            process = subprocess.Popen([TOOL, "run", path, "-q", *SMALL], stdout=slave, env=env)
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


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: tool_test.py PATH_OF_TOOL [unittest arguments]")
    TOOL = os.path.abspath(sys.argv.pop(1))
    unittest.main(verbosity=2)
