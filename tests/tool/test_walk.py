"""Which files a run reads: order, binary files, .gitignore."""
import json
import os
import shutil
import subprocess

from tool import harness
from tool.harness import Case


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

    def test_a_file_that_goes_before_it_is_read_is_left_out(self):
        for name in ("tree/a", "tree/b", "c"):
            self.write(name)
        for named, code in (["tree"], 0), (["c", "tree"], 3):
            self.write("tree/b")
            pipe = self.path(f"pipe{code}")
            os.mkfifo(pipe)
            process = subprocess.Popen([harness.TOOL, "run", "--list", "--json", pipe, *named],
                                       cwd=self.folder, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE)
            with open(pipe, "wb") as file:  # opens when the walk is over
                os.unlink(self.path("tree/b"))
                os.unlink(self.path("c")) if code else None
                file.write(b"text")
            out, message = process.communicate(timeout=60)
            self.assertEqual(process.returncode, code, message)
            if code == 0:
                found = json.loads(out)
                self.assertEqual([file["path"] for file in found["files"]], [pipe, "tree/a"])
                self.assertEqual(found["files_left_out"], 1)
                self.assertIn(b"tree/b: No such file or directory; left out", message)

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
                   ["cache/x", "s/cache/x", "a/z", "a/b/z", "a/b/c/z", "b/a/z", "logs/x",
                    "logs/s/y", "s/logs/x"], ["b/a/z", "s/logs/x"])

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
